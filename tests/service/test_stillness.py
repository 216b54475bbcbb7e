"""Workers that nobody waits for: stand-ins judged at times of the test's own, and real processes with real signals."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.errors import JobError
from service.jobs import local, stillness
from service.jobs.stillness import Patience, Stillness
from service.run_folder import RunFolder
from tests.integration.processes import await_, lives


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    made = RunFolder(tmp_path / "runs/job")
    made.make()
    return made


class Process:
    """What is asked of a process of the system."""

    def __init__(self, pid: int, rank: int | None = None, *children: "Process") -> None:
        self.pid, self.now, self._children = pid, psutil.STATUS_SLEEPING, list(children)
        self._environment = {} if rank is None else {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "job"}

    def children(self) -> list["Process"]:
        return [child for child in self._children if child.now != "gone"]

    def environ(self) -> dict[str, str]:
        return self._environment

    def status(self) -> str:
        return self.now


class Machine:
    """A torchrun with workers of these ranks, looked at every five seconds by a launcher that allows twenty."""

    def __init__(self, folder: RunFolder, *ranks: int) -> None:
        self.workers = [Process(100 + rank, rank) for rank in ranks]
        self.torchrun = Process(1, None, Process(2), *self.workers)
        self.still = Stillness(folder, 20.0)
        self.killed: list[int] = []
        self.now_s = 1000.0

    def kill(self, process: Process) -> None:
        self.killed.append(process.pid)
        process.now = "gone"

    def look(self, times: int, every_s: float = 5.0) -> list[int]:
        """Who is killed meanwhile."""
        self.killed.clear()
        for _ in range(times):
            self.still.look(self.torchrun, self.now_s)  # type: ignore[arg-type]
            self.now_s += every_s
        return list(self.killed)


@pytest.fixture(autouse=True)
def _killing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Stand-ins are killed by their machine."""
    if "machine" in request.fixturenames:
        monkeypatch.setattr(stillness, "kill_family", lambda one: request.getfixturevalue("machine").kill(one))


@pytest.fixture
def machine(folder: RunFolder, request: pytest.FixtureRequest) -> Machine:
    return Machine(folder, *request.param)


two, one, second = (pytest.mark.parametrize("machine", [ranks], indirect=True) for ranks in ((0, 1), (0,), (1,)))


@one
def test_a_worker_alone_that_a_signal_has_stopped_is_ended_after_the_time_and_not_before(machine: Machine) -> None:
    machine.workers[0].now = psutil.STATUS_STOPPED
    assert machine.look(4) == []
    assert machine.look(1) == [100]
    assert machine.still.explain(100).startswith("worker 0 stood still for 20 s, stopped by a signal")
    assert (machine.still.explain(101), machine.still.is_over) == ("", False)


@one
def test_one_that_somebody_looks_into_with_a_debugger_is_not(machine: Machine) -> None:
    machine.workers[0].now = psutil.STATUS_TRACING_STOP
    assert machine.look(20) == []


@one
def test_one_that_goes_on_before_the_time_begins_anew(machine: Machine) -> None:
    for _ in range(5):
        machine.workers[0].now = psutil.STATUS_STOPPED
        assert machine.look(4) == []
        machine.workers[0].now = psutil.STATUS_RUNNING
        assert machine.look(1) == []


@one
def test_time_in_which_the_launcher_was_stopped_too_does_not_count(machine: Machine) -> None:
    """As by a scheduler that suspends a job."""
    machine.workers[0].now = psutil.STATUS_STOPPED
    assert machine.look(1, every_s=86400.0) == []
    assert machine.look(2) == []
    assert machine.look(1) == [100]


@two
def test_one_that_is_stopped_beside_one_that_works_is_left_to_that_one(machine: Machine) -> None:
    """It names the missing one at the end of `timeout_s`, with stacks; ended before, there would be less to say."""
    machine.workers[1].now = psutil.STATUS_STOPPED
    assert machine.look(50) == []


@two
def test_all_that_are_stopped_are_ended(machine: Machine) -> None:
    for worker in machine.workers:
        worker.now = psutil.STATUS_STOPPED
    assert machine.look(5) == [100, 101]


@two
def test_who_lives_on_after_all_is_done_is_ended_with_torchrun_and_the_job_is_over(
    machine: Machine, folder: RunFolder
) -> None:
    machine.workers[0].now = "gone"
    assert machine.look(10) == []
    folder.note_end(is_done=True)
    assert machine.look(4) == []
    assert machine.look(1) == [1]
    assert (machine.still.is_over, machine.still.ended) == (True, {})


@second
def test_while_the_main_worker_is_not_done_nobody_is_ended_however_long_it_registers(
    machine: Machine, folder: RunFolder
) -> None:
    folder.write("summary.json", {"wall_s": 1})
    assert machine.look(100) == []
    machine.workers[0].now = "gone"
    assert machine.look(100) == [], "nor a torchrun that waits for the main worker's machine"
    folder.note_end(is_done=True)
    assert machine.look(5) == [1]
    assert machine.still.is_over


@one
def test_a_main_worker_that_died_before_it_was_done_is_no_success(machine: Machine, folder: RunFolder) -> None:
    """Its torchrun waits for another machine to form anew."""
    folder.write("summary.json", {"wall_s": 1})
    machine.workers[0].now = "gone"
    assert machine.look(100) == []
    assert not machine.still.is_over


def test_the_end_of_an_earlier_run_ends_nobody(folder: RunFolder) -> None:
    folder.note_end(is_done=True)
    machine = Machine(folder, 0)
    assert machine.look(100) == []
    folder.note_end(is_done=False)
    assert machine.look(100) == []


def test_what_cannot_be_read_is_no_end(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.note_end(is_done=True)
    machine = Machine(folder, 0)
    folder.path.rename(folder.path.with_name("away"))
    assert machine.look(100) == []


def test_of_many_things_the_one_seen_for_the_shortest_time_counts() -> None:
    patience = Patience(10.0, 10.0)
    assert not patience.ends(0.0, ["a"])
    assert not patience.ends(8.0, ["a", "b"])
    assert not patience.ends(16.0, ["a", "b"])
    assert patience.ends(18.0, ["a", "b"])
    assert not patience.ends(19.0, [])


# torchrun with a worker for each line of Python, which ends as badly as the worst of them.
LAUNCHER = """
import os, subprocess, sys, time
children = []
for rank, program in enumerate(sys.argv[1:]):
    environment = os.environ | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "job"}
    children.append(subprocess.Popen([sys.executable, "-c", program], env=environment))
    open(f"pid{rank}", "w").write(str(children[-1].pid))
codes = [child.wait() for child in children]
for rank, (child, code) in enumerate(zip(children, codes)):
    if code:
        print(f"  rank      : {rank} (local_rank: {rank})\\n  exitcode  : {code} (pid: {child.pid})", file=sys.stderr)
while any(codes) and "RESTARTS" in os.environ:
    time.sleep(1)
sys.exit(any(codes))
"""
FREEZE = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
# With a child, as the readers of a data set are.
LIVE_ON = """
import subprocess, time
open("pid8", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
time.sleep(600)
"""
DONE = textwrap.dedent("""
    import os
    open("new", "w").write('{"time_ns": 7}')
    os.replace("new", "runs/job/end.json")
""")
LIMIT_S = 4.0


def launch(folder: RunFolder, *workers: str) -> None:
    line = [sys.executable, "-c", LAUNCHER, *workers]
    local.launch(folder, line, len(workers), timeout_s=LIMIT_S, grace_s=120)


@pytest.fixture
def begun() -> Iterator[None]:
    """Nothing that a test has begun is left at its end."""
    yield
    numbers = {int(path.read_text()) for path in Path().glob("pid?")}
    assert numbers
    await_(lambda: not any(lives(one) for one in psutil.process_iter() if one.pid in numbers), "all are gone", 30)


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("program", [FREEZE, LIVE_ON])
def test_a_process_that_does_not_end_after_all_is_done_is_killed_with_its_own_and_the_launcher_ends_well(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    # Where torchrun would start them again.
    monkeypatch.setenv("RESTARTS", "1")
    launch(folder, DONE, program)


@pytest.mark.usefixtures("begun")
def test_an_error_that_a_worker_has_told_is_the_jobs_end_all_the_same(folder: RunFolder) -> None:
    told = json.dumps({"type": "StorageError", "message": "the disk is full", "exit_code": 7})
    with pytest.raises(JobError):
        launch(folder, DONE + f"open('runs/job/error.json', 'w').write({told!r})", LIVE_ON)


@pytest.mark.usefixtures("begun")
def test_a_process_alone_that_a_signal_has_stopped_is_killed_and_the_launcher_says_why(folder: RunFolder) -> None:
    says = r"^worker 0 stood still for 4 s, stopped by a signal such as SIGSTOP; --resume goes on"
    with pytest.raises(JobError, match=says) as caught:
        launch(folder, FREEZE)
    assert caught.value.exit_code == 8


def test_children_of_torchrun_that_are_no_workers_are_none(folder: RunFolder) -> None:
    """Between fork and exec one has torchrun's own environment, in which a cluster may have put a RANK."""
    line = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    stranger = subprocess.Popen(line, env=os.environ | {"RANK": "0"}, stdout=subprocess.PIPE)
    try:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        stranger.send_signal(19)
        still = Stillness(folder, 20.0)
        for at_s in range(0, 100, 5):
            still.look(psutil.Process(), time.monotonic() + at_s)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
