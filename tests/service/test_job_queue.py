"""The queue: nobody is delayed by who comes later, nobody starves, and nothing takes more than there is."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import queue
from service.jobs.queue import Amount, Entry

GB = 10**9
CAPACITY = Amount(4, 8.0, 64 * GB)


def entry(
    name: str, since_s: float = 0.0, gpus: int = 0, cpus: float = 1.0, priority: int = 0, memory_gb: int = 0
) -> Entry:
    return Entry(name, priority, since_s, Amount(gpus, cpus, memory_gb * GB))


def names(entries: list[Entry]) -> str:
    return "".join(one.id for one in entries)


def test_the_same_priority_is_first_come_first_served() -> None:
    waiting = [entry("c", 3), entry("a", 1), entry("b", 2)]
    assert names(queue.next_ones(waiting, [], Amount(0, 2))) == "ab"


def test_a_higher_priority_comes_first_and_is_worth_ten_minutes_a_point() -> None:
    assert names(queue.in_order([entry("a", 0), entry("b", 599, priority=1)])) == "ba"
    assert names(queue.in_order([entry("a", 0), entry("b", 601, priority=1)])) == "ab"


def test_small_jobs_pass_a_large_one_only_while_it_would_fit_beside_them() -> None:
    # Runs: 4 of 8 cores, since before. The head wants 6, so 2 may be used behind it.
    running = [entry("r", -1, cpus=4)]
    waiting = [entry("h", 0, cpus=6), *(entry(name, 1 + place, cpus=1) for place, name in enumerate("wxyz"))]
    assert names(queue.next_ones(waiting, running, Amount(0, 8))) == "wx"
    # These two run now: nothing further passes.
    assert names(queue.next_ones(waiting, [*running, *waiting[1:3]], Amount(0, 8))) == ""
    # The one from before has ended: it is the head's turn, whatever has passed it still runs.
    assert names(queue.next_ones([waiting[0], *waiting[3:]], waiting[1:3], Amount(0, 8))) == "h"


def test_what_the_head_does_not_need_is_free_for_others() -> None:
    running = [entry("r", -1, gpus=4, cpus=1)]
    waiting = [entry("g", 0, gpus=2, cpus=1), entry("s", 1, gpus=2, cpus=1), entry("c", 2, cpus=6)]
    # "s" fits beside the head in GPUs once "r" has ended, but not now; "c" leaves the head its core.
    assert names(queue.next_ones(waiting, running, CAPACITY)) == "c"


def test_two_jobs_that_each_name_all_of_the_memory_take_turns_and_one_that_names_none_runs_beside_them() -> None:
    waiting = [entry("a", 0, memory_gb=64), entry("b", 1, memory_gb=64), entry("n", 2)]
    assert names(queue.next_ones(waiting, [], CAPACITY)) == "an"
    # Beside the head, which is "b", there would be no gigabyte left.
    assert names(queue.next_ones([*waiting[1:], entry("s", 3, memory_gb=1)], waiting[:1], CAPACITY)) == "n"


def test_an_amount_is_told_as_people_say_it() -> None:
    assert str(Amount(1, 2.5)) == "1 GPUs and 2.5 cores"
    assert str(Amount(8, 64, 512 * GB)) == "8 GPUs, 64 cores and 512.0 GB of memory"


needs = st.builds(
    Amount,
    st.integers(0, 4),
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.0, 8.0]),
    st.sampled_from([0, 0, 1, 20, 40, 64]).map(lambda amount_gb: amount_gb * GB),
)


@dataclass
class Plan:
    """What comes when, what it takes, and how many rounds it runs."""

    jobs: list[tuple[int, Amount, int, int]] = field(default_factory=list)


plans = st.builds(
    Plan,
    st.lists(
        st.tuples(st.integers(0, 12), needs, st.integers(1, 6), st.sampled_from([-100, 0, 0, 0, 1, 100])), max_size=30
    ),
)


def test_a_job_waits_for_what_it_takes_of_and_for_nothing_else() -> None:
    # As after a restart with less memory, or of jobs that were begun before it counted.
    running = [Entry("a", 0, 0, Amount(0, 1, 48 * GB)), Entry("b", 0, 1, Amount(0, 1, 48 * GB))]
    small, large = Entry("c", 0, 2, Amount(0, 1)), Entry("d", 0, 3, Amount(0, 1, 1 * GB))
    assert queue.next_ones([small, large], running, CAPACITY) == [small]


@given(plans)
@settings(max_examples=150)
def test_every_job_runs_in_the_end_and_never_more_at_once_than_there_is(plan: Plan) -> None:
    coming = [
        (Entry(f"{number:03}", priority, came + number / 1000, need), lasts, came)
        for number, (came, need, lasts, priority) in enumerate(plan.jobs)
    ]
    ends: dict[str, int] = {}
    started: dict[str, int] = {}
    for round_ in range(13 + sum(lasts for _, lasts, _ in coming)):
        here = [(one, lasts) for one, lasts, came in coming if came <= round_]
        running = [one for one, _ in here if one.id in started and ends[one.id] > round_]
        waiting = [one for one, _ in here if one.id not in started]
        for one in queue.next_ones(waiting, running, CAPACITY):
            started[one.id] = round_
            ends[one.id] = round_ + {other.id: lasts for other, lasts in here}[one.id]
            running.append(one)
        assert queue.total(running).gpus <= 4
        assert queue.total(running).cpus <= 8 + 1e-6
        assert queue.total(running).memory <= 64 * GB
    assert started.keys() == {one.id for one, _, _ in coming}
    # Equal in all they need: first come, first served.
    for one, _, _ in coming:
        for other, _, _ in coming:
            if (one.priority, one.needs) == (other.priority, other.needs) and one.since_s < other.since_s:
                assert started[one.id] <= started[other.id]


@given(
    st.lists(st.tuples(needs, st.integers(1, 5)), min_size=1, max_size=6),
    needs,
    st.lists(needs, min_size=1, max_size=4),
)
@settings(max_examples=150)
def test_the_head_starts_when_all_that_ran_before_it_has_ended_however_many_small_ones_come(
    before: list[tuple[Amount, int]], head_needs: Amount, stream: list[Amount]
) -> None:
    ahead: list[tuple[Entry, int]] = []
    for number, (need, lasts) in enumerate(before):
        one = Entry(f"a{number}", 0, -10 + number, need)
        if (queue.total(other for other, _ in ahead) + need).fits(CAPACITY):
            ahead.append((one, lasts))
    head = Entry("head", 0, 0, head_needs)
    behind: list[Entry] = []
    waiting: list[Entry] = [head]
    for round_ in range(7):
        # Those who overtake run for ever, and new ones never end coming.
        waiting += [Entry(f"b{round_}-{number}", 0, 1 + round_, need) for number, need in enumerate(stream)]
        running = [one for one, lasts in ahead if lasts > round_] + behind
        chosen = queue.next_ones(waiting, running, CAPACITY)
        behind += [one for one in chosen if one is not head]
        waiting = [one for one in waiting if one not in chosen]
        if head in chosen:
            return
        assert any(lasts > round_ for _, lasts in ahead), "nothing that came before runs, and the head still waits"
    raise AssertionError("the head never started")


def test_what_fits_no_machine_is_in_nobodys_way() -> None:
    waiting = [entry("l", gpus=9), entry("s", since_s=1, gpus=1)]
    assert names(queue.next_ones(waiting, [], CAPACITY)) == "s"
