"""Jobs of several machines, each with its own address, that lose machines, workers and cables, and get them back."""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from machines import ROOT, Machine, Network, network

from service import tracking
from service.errors import REQUEUE, LostPeerError
from tests.integration import sample_logs
from tests.integration.debian import RefusedError
from tests.integration.processes import await_

pytestmark = pytest.mark.integration

SAMPLES = 203
GLOBAL_BATCH = 64
SAVE_EVERY = 20
# Seconds without training for any loss or return; a machine that is slow, or stands still meanwhile, has twice as many
# and what it took to start. Without the mechanisms it would be `timeout_s`.
PROMISED_S = 30
JOB = f"""
name: job
output: runs
duration: 100000 steps
evaluate_every: 100000 steps
global_batch: {GLOBAL_BATCH}
micro_batch: 8
device: cpu
log_samples: true
data: {{name: demo, root: demo, size: 32, options: {{train_count: {SAMPLES}, val_count: 30, size: 40}}}}
pretext: {{name: lorot_e}}
objective: {{name: multi_task}}
model: {{name: resnet_small, width: 16}}
optimizer: {{lr: 0.01}}
schedule: {{warmup: 100 steps}}
checkpoint: {{every: {SAVE_EVERY} steps}}
tracking: {{uri: "sqlite:///mlflow.db", log_every: 50 steps, system_metrics: false}}
"""
# What a worker's log says last when it ends by an error.
END = "this worker ends here"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tracking.ensure_ready("sqlite:///mlflow.db")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture
def net(place: Path) -> Iterator[Network]:
    try:
        with network(2, place) as made:
            yield made
    except RefusedError as error:
        pytest.skip(str(error))


def meet(net: Network, port: str = "0") -> tuple[subprocess.Popen[str], str]:
    """Start the rendezvous outside the machines; it, and its HOST:PORT."""

    def said() -> list[str]:
        return re.findall(r"ready at (\S+)", net.hub.said.read_text())

    line = ["-m", "service.cli", "rendezvous", "--host", net.hub.address, "--port", port]
    earlier = len(said()) if net.hub.said.exists() else 0
    process = net.hub.start(*line)
    await_(lambda: len(said()) > earlier, "the rendezvous is ready", 90)
    return process, said()[-1]


def join(machine: Machine, where: str, *arguments: str, nnodes: str = "1:2") -> subprocess.Popen[str]:
    """Let a machine take part in the job, with one worker."""
    line = ["-m", "service.cli", "train", "job.yaml", *arguments, "--nnodes", nnodes, "--rdzv", where, "--nproc", "1"]
    return machine.start(*line)


def join_by_torchrun(machine: Machine, where: str, *arguments: str) -> subprocess.Popen[str]:
    """Let a machine take part as `join` does, by the script for launchers that want plain torchrun."""
    script = [str(ROOT / "configs/launch/torchrun.sh"), "1:2", where, "1", "job", "job.yaml", *arguments]
    return machine.run("bash", *script, ADDRESS=machine.address, GLOO_SOCKET_IFNAME="eth0")


def main_machine(net: Network) -> Machine:
    """The one that has the worker of rank 0."""
    ranks = {psutil.Process(pid).environ()["RANK"]: machine for machine in net.machines for pid in machine.workers()}
    return ranks["0"]


def steps_begun(place: Path, rank: int) -> int:
    return len(sample_logs.lines_of(place / "runs/job", rank))


def await_steps(place: Path, rank: int, count: int, what: str, seconds: float = 150) -> float:
    """Wait until a worker of this rank has begun so many more steps; the time of the first of them."""
    before = steps_begun(place, rank)
    first = await_(lambda: steps_begun(place, rank) > before + 1, what, seconds, lambda: told(place))
    await_(lambda: steps_begun(place, rank) > before + count, f"{what}, and on", seconds, lambda: told(place))
    return first


def told(place: Path) -> str:
    """What there is to read when a test fails."""
    logs = [*place.glob("said-*.txt"), *place.glob("runs/job/*.log"), *place.glob("runs/job/error.json")]
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in logs)


def stop(place: Path, jobs: dict[str, subprocess.Popen[str]]) -> None:
    """Ask these machines to stop, and wait until they have, in a way that schedulers start again."""
    for job in jobs.values():
        job.send_signal(signal.SIGTERM)
    assert [job.wait(timeout=120) for job in jobs.values()] == [REQUEUE] * len(jobs), told(place)


def saved(place: Path) -> int:
    return sample_logs.newest_checkpoint(place / "runs/job")


def went_on(place: Path, struck_ns: int, saved_before: int) -> None:
    """Whoever trained first after a blow began behind the checkpoint that was there before it."""
    last, first = sample_logs.around(place / "runs/job", struck_ns)
    assert 0 < saved_before < first <= last + 1
    # The newest one may have been on its way to the disk.
    assert first > last - 2 * SAVE_EVERY


def stopped(place: Path, struck_ns: int) -> None:
    """All workers have ended at one step, which was saved: whoever trained first after a stop began right behind it."""
    last, first = sample_logs.around(place / "runs/job", struck_ns)
    assert first == last + 1, told(place)


def test_a_machine_is_known_by_the_address_at_which_the_others_reach_it(net: Network) -> None:
    told = "from service.jobs import nodes; a = nodes.address_towards(*{!r}); print(a, nodes.interface_of(a))"
    for machine in net.machines:
        assert machine.start("-c", told.format((net.hub.address, 29400))).wait(timeout=120) == 0
        assert machine.said.read_text() == f"{machine.address} eth0\n"


def test_whatever_machine_is_lost_the_rest_goes_on_and_no_sample_is_skipped_or_seen_twice(
    place: Path, net: Network
) -> None:
    """Three losses: the second machine, the one with the main worker, and a worker alone; both machines come back.

    Then the rendezvous, a stop of the machine with the main worker, and one of all that are left: the same lines start
    them again, each time.
    """
    rendezvous, where = meet(net)
    first, second = net.machines
    began = time.monotonic()
    jobs = {machine.address: join(machine, where) for machine in net.machines}
    start_s = await_steps(place, 1, 25, "both machines train", 300) - began
    await_(lambda: saved(place) > 0, "a checkpoint", 60)
    lost, back, blows = [], [], []

    for machine in (second, first):
        blows.append((time.time_ns(), saved(place)))
        died = machine.kill()
        jobs.pop(machine.address)
        # Whoever is left is rank 0.
        lost.append(await_steps(place, 0, 25, f"the others go on without {machine.address}") - died)
        blows.append((time.time_ns(), saved(place)))
        returned = time.monotonic()
        jobs[machine.address] = join(machine, where)
        back.append(await_steps(place, 1, 25, f"{machine.address} is taken back") - returned)

    await_(lambda: len(second.workers()) == 1, "the second machine has its worker", 150, lambda: told(place))
    (worker,) = second.workers()
    blows.append((time.time_ns(), saved(place)))
    died = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    lost.append(await_steps(place, 1, 25, "the lost worker is started again") - died)
    said = "\n".join(
        f"{name}: {', '.join(f'{s:.1f} s' for s in times)}"
        for name, times in (
            ("from the start to the first step", [start_s]),
            ("from a death to the next step", lost),
            ("from a return to its first step", back),
        )
    )
    print(said)
    for struck_ns, saved_before in blows:
        went_on(place, struck_ns, saved_before)
    assert max(lost + back) < 2 * PROMISED_S + start_s, said

    struck_ns, saved_before = time.time_ns(), saved(place)
    rendezvous.kill()
    assert [job.wait(timeout=300) for job in jobs.values()] == [LostPeerError.exit_code] * 2, told(place)
    assert all("the rendezvous cannot be reached any more" in machine.said.read_text() for machine in net.machines)
    meet(net, where.rpartition(":")[2])
    jobs = {machine.address: join(machine, where) for machine in net.machines}
    await_steps(place, 1, 5, "the same lines go on at a new rendezvous")
    went_on(place, struck_ns, saved_before)

    struck_ns, reclaimed = time.time_ns(), main_machine(net).address
    stop(place, {reclaimed: jobs.pop(reclaimed)})
    await_steps(place, 0, 5, f"the others go on without {reclaimed}")
    stopped(place, struck_ns)
    assert [job.poll() for job in jobs.values()] == [None]

    struck_ns = time.time_ns()
    stop(place, jobs)
    jobs = {machine.address: join(machine, where) for machine in net.machines}
    await_steps(place, 1, 5, "the same lines go on after a stop of all")
    stopped(place, struck_ns)

    # The last step's samples are all there once nobody writes any more.
    stop(place, jobs)
    seen = sample_logs.order(place / "runs/job")
    assert {len(ids) for ids in seen} == {GLOBAL_BATCH}
    times = Counter(dict.fromkeys(range(SAMPLES), 0))
    for step, ids in enumerate(seen, start=1):
        times.update(ids)
        # An epoch may end within a step; after each step every sample was seen in as many epochs, or in one more.
        epochs, further = divmod(step * GLOBAL_BATCH, SAMPLES)
        assert times.keys() == set(range(SAMPLES))
        assert Counter(times.values()) == Counter(
            {epochs: SAMPLES - further} | ({epochs + 1: further} if further else {})
        )
    assert epochs > 10


def test_a_pulled_cable_ends_in_a_clear_error_on_both_sides_and_the_reachable_one_goes_on(
    place: Path, net: Network
) -> None:
    """The reachable one is started by plain torchrun, the other by `lorot train`.

    Within seconds, however long collective operations wait: no packet says that a machine is gone.
    """
    _, where = meet(net)
    first, second = net.machines
    timeout_s = 900
    began = time.monotonic()
    plain = join_by_torchrun(first, where, f"timeout_s={timeout_s}")
    # The other may have saved by then; the name it meets by says that it is the same job.
    launched = join(second, where, f"timeout_s={timeout_s}")
    start_s = await_steps(place, 1, 5, "both machines train", 300) - began
    cut = time.monotonic()
    second.set_link("down")
    log = place / "runs/job/log-rank0.txt"
    await_(lambda: END in log.read_text(), "worker 0 says so", 90, lambda: told(place))
    noticed_s = time.monotonic() - cut
    on_s = await_steps(place, 0, 25, "the reachable machine goes on") - cut
    times = f"noticed after {noticed_s:.1f} s, the next step after {on_s:.1f} s; the first one after {start_s:.1f} s"
    print(times)
    assert noticed_s < 2 * PROMISED_S + start_s, times
    assert on_s < 2 * PROMISED_S + start_s, times
    said = log.read_text()
    assert "worker 0, after step " in said
    assert "machine 1 of the job has given no sign of life for 10 s" in said
    assert re.search(r"  worker 1: step \d+, ", said)
    cut_off = (place / "runs/job/log-rank1.txt").read_text()
    assert END in cut_off
    assert f"the rendezvous at {where} has not answered for 10 s" in cut_off
    assert all("Thread 0x" in one for one in (said, cut_off)), "what each thread was doing"
    # The machine that is cut off cannot reach the rendezvous either: nobody trains there on his own.
    assert second.workers() == []
    assert launched.poll() in (None, LostPeerError.exit_code)
    assert plain.poll() is None


def test_a_machine_that_died_is_taken_back_by_one_that_plain_torchrun_has_started(place: Path, net: Network) -> None:
    """The one with the main worker, which the same line of the script starts again."""
    _, where = meet(net)
    jobs = {machine.address: join_by_torchrun(machine, where) for machine in net.machines}
    await_steps(place, 1, 5, "both machines train", 300)
    await_(lambda: saved(place) > 0, "a checkpoint", 60)
    lost = main_machine(net)
    blows = [(time.time_ns(), saved(place))]
    lost.kill()
    jobs.pop(lost.address)
    await_steps(place, 0, 25, f"the other goes on without {lost.address}")
    blows.append((time.time_ns(), saved(place)))
    jobs[lost.address] = join_by_torchrun(lost, where)
    await_steps(place, 1, 5, f"{lost.address} is taken back")
    for struck_ns, saved_before in blows:
        went_on(place, struck_ns, saved_before)
    assert [job.poll() for job in jobs.values()] == [None, None]
