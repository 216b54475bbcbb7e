"""What the console makes of times, logs, costs and of YAML that somebody types."""

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from service.console import cost, words, yaml_text
from service.jobs.job import Attempt, Job
from service.jobs.spec import JobSpec


@pytest.mark.parametrize(
    ("past_s", "said"),
    [
        (0, "0 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (7199, "1 h ago"),
        (86400, "1 day ago"),
        (2e6, "23 days ago"),
    ],
)
def test_a_moment_is_told_by_how_long_ago_it_was(past_s: float, said: str) -> None:
    assert words.ago(1e9 - past_s, 1e9) == said


def test_a_clock_that_runs_ahead_is_no_time_ago() -> None:
    assert words.ago(1e9 + 5, 1e9) == "0 s ago"


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.2, "3 s"), (275, "4 min 35 s"), (7260, "2 h 1 min"), (2e5, "2 days 7 h")]
)
def test_a_span_is_told_in_its_own_units(seconds: float, said: str) -> None:
    assert words.span(seconds) == said


@pytest.mark.parametrize(
    ("code", "said"),
    [(None, ""), (0, "0: success"), (5, "5: no usable checkpoint or model"), (-9, "ended by SIGKILL"), (42, "42")],
)
def test_an_exit_code_says_what_it_means(code: int | None, said: str) -> None:
    assert words.exit_words(code) == said


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("\x1b[31mred\x1b[0m and \x1b[1;4mbold\x1b[m", "red and bold"),
        ("\x1b]0;a title\x07after", "after"),
        ("\x1b]8;;http://evil.example\x1b\\a link\x1b]8;;\x1b\\", "a link"),
        ("10 %\r20 %\r30 %\nnext", "30 %\nnext"),
        ("one\r\ntwo\r\n", "one\ntwo\n"),
        ("a\x00b\x08c", "a�b�c"),
        ("user\u202egpj.exe", "user�gpj.exe"),
        ("\x1b[2J\x1b[H<script>", "<script>"),
        ("tab\there", "tab\there"),
    ],
)
def test_a_log_is_read_without_what_it_would_do_to_a_terminal(written: str, read: str) -> None:
    assert words.plain(written) == read


@given(st.text())
def test_nothing_invisible_is_left_in_a_log(text: str) -> None:
    left = words.plain(text)
    assert not {char for char in left if ord(char) < 32 or 127 <= ord(char) < 160} - {"\n", "\t"}


def test_the_end_of_a_long_log_begins_with_a_whole_line() -> None:
    pieces = (f"line {number}\n".encode() for number in range(100_000))
    lines = words.tail(pieces, most_bytes=1000).splitlines()
    assert lines[-1] == "line 99999"
    assert lines[0] == f"line {100_000 - len(lines)}"
    assert 60 < len(lines) < 100


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("val/top1", 0.8125, "81.2%"),
        ("train/loss", 1.23456, "1.235"),
        ("train/images_per_s", 12345.6, "12,346"),
        ("val/AP50", 0.5, "50.0%"),
        ("wsol.centre_box@0.5", 0.412, "41.2%"),
        ("train/loss", float("nan"), "not finite"),
    ],
)
def test_a_metric_is_told_as_people_read_it(name: str, value: float, said: str) -> None:
    assert words.metric(name, value) == said


def job(*attempts: Attempt, ended_s: float = 0.0, **spec: object) -> Job:
    return Job(
        "0" * 32,
        "1",
        JobSpec.model_validate(spec),
        "finished" if ended_s else "running",
        attempts=attempts,
        ended_s=ended_s,
    )


def test_the_cost_is_what_was_set_aside_times_the_time_of_all_attempts() -> None:
    first, second = Attempt(1, "a", started_s=1000.0, ended_s=4600.0), Attempt(2, "b", started_s=5000.0)
    asked = {"backend": "docker", "nodes": "2", "resources": {"gpus": 4, "cpus": 16}}
    # As resolved: the job itself need not name its batch.
    found = dict(cost.rows(job(first, second, **asked), {"step": 100}, {"global_batch": 256}, now_s=8600.0))
    # An hour and an hour; 8 GPUs and 32 cores.
    assert found == {"Wall time": "2 h 0 min", "GPU-hours": "16.0", "Core-hours": "64.0", "Images trained on": "25,600"}
    later = replace(first, number=7)
    assert dict(cost.rows(job(later, second), {}, {}, now_s=8600.0)).keys() >= {"Wall time since attempt 7"}


def test_a_job_that_never_started_has_cost_nothing_and_what_is_not_known_is_not_told() -> None:
    assert cost.rows(job(), {}, {}, 1e9) == []
    begun = job(Attempt(1, "a", started_s=0.5, ended_s=3600.5), ended_s=3600.5)
    assert "Images trained on" not in dict(cost.rows(begun, {"step": 5}, {}, 1e9))
    assert "Images trained on" not in dict(cost.rows(begun, {}, {"global_batch": 8}, 1e9))


def test_an_attempt_whose_end_nobody_saw_costs_no_longer_than_its_job() -> None:
    lost = job(Attempt(1, "a", started_s=1000.0), ended_s=1060.0)
    assert cost.seconds(lost, now_s=9e9) == 60.0


def test_a_key_is_found_on_its_line() -> None:
    text = yaml_text.read(
        "duration: 4 steps\noptimizer:\n  # slow\n  lr: 0.1\ndata:\n  sizes:\n  - {size: 32}\n  - size: 64\n"
    )
    assert text.problem == ""
    assert text.line_of(["optimizer", "lr"]) == 4
    assert text.line_of(["optimizer", "momentum"]) == 2
    assert text.line_of(["data", "sizes", "1", "size"]) == 8
    assert text.line_of(["model"]) == 0


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: [1, 2\nc: 3", 3, "not valid YAML"),
        ("a: 1\nb: 2\na: 3", 3, "given twice"),
        ("a: {x: 1,\n x: 2}", 2, "given twice"),
        ("- 1\n- 2", 1, "mapping"),
        ("just words", 1, "mapping"),
        ("a: 1\nextends: ../secret.yaml", 2, "extends"),
        ("a: &x [1]\nb: *x", 2, "aliases"),
        ("a: &x [*x]", 1, "aliases"),
        ("when: 2026-01-01", 1, "quotes"),
        ("a: 1\nb: {c: 2026-01-01}", 2, "b.c"),
        ("1: one", 0, "no text"),
        ("a: .nan", 1, "no number"),
        ("a: !!python/object/apply:os.system ['id']", 1, "not valid YAML"),
        ("a: " + "[" * 200, 1, "deep"),
        ("a: \x07", 0, "not valid YAML"),
        ("a: " + "9" * 5000, 0, "not valid YAML"),
    ],
)
def test_a_text_that_is_no_configuration_says_why_and_where(text: str, line: int, says: str) -> None:
    found = yaml_text.read(text)
    assert says in found.problem
    assert found.line == line
    assert found.values == {}


@given(
    st.recursive(
        st.one_of(st.integers(-9, 9), st.text("abc", max_size=3), st.booleans(), st.none()),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_plain_mapping_is_read_as_yaml_has_it(value: object) -> None:
    text = yaml.safe_dump({"key": value})
    found = yaml_text.read(text)
    # Its own writer makes aliases of lists that are the same one.
    assert found.values == {"key": value} or "aliases" in found.problem


@given(st.text(max_size=80))
def test_no_text_is_more_than_a_problem(text: str) -> None:
    assert isinstance(yaml_text.read(text).problem, str)
