"""Workers that nobody waits for: small stand-ins for torchrun and its workers, as real processes with real signals."""

import json
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from service.errors import JobError
from service.jobs import local
from service.run_folder import RunFolder
from tests.integration.processes import await_, lives

# torchrun with a worker for each line of Python, which ends as badly as the worst of them.
LAUNCHER = """
import os, subprocess, sys, time
children = []
for rank, program in enumerate(sys.argv[1:]):
    environment = os.environ | {"RANK": str(rank + int(os.environ.get("FIRST", "0")))}
    children.append(subprocess.Popen([sys.executable, "-c", program], env=environment))
    open(f"pid{rank}", "w").write(str(children[-1].pid))
codes = [child.wait() for child in children]
while any(codes) and "RESTARTS" in os.environ:
    time.sleep(1)
time.sleep(float(os.environ.get("BARRIER", "0")))
for rank, (child, code) in enumerate(zip(children, codes)):
    if code:
        print(f"  rank      : {rank} (local_rank: {rank})\\n  exitcode  : {code} (pid: {child.pid})", file=sys.stderr)
sys.exit(any(codes))
"""
FREEZE = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
LIVE_ON = "import time; time.sleep(600)"
LIMIT_S = 1.2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    made = RunFolder(tmp_path / "runs/job")
    made.make()
    return made


def leaving(after_s: float = 0.0) -> str:
    """A main worker that leaves the job's summary and ends `after_s` seconds later."""
    return textwrap.dedent(f"""
        import os, time
        open("new", "w").write("{{}}")
        os.replace("new", "runs/job/summary.json")
        time.sleep({after_s})
    """)


def launch(folder: RunFolder, *workers: str) -> float:
    """Run the workers as a job; returns how long it took."""
    began = time.monotonic()
    line = [sys.executable, "-c", LAUNCHER, *workers]
    local.launch(folder, line, len(workers), timeout_s=LIMIT_S, grace_s=120)
    return time.monotonic() - began


def nothing_lives() -> bool:
    begun = {int(path.read_text()) for path in Path().glob("pid?")}
    assert begun
    await_(
        lambda: not any(lives(process) for process in psutil.process_iter() if process.pid in begun), "all are gone", 30
    )
    return True


@pytest.mark.parametrize("program", [FREEZE, LIVE_ON])
def test_a_worker_that_stands_still_after_the_jobs_summary_is_ended_and_the_job_has_ended_well(
    folder: RunFolder, program: str
) -> None:
    launch(folder, leaving(), program)
    assert nothing_lives()


@pytest.mark.parametrize("first", ["1", "7"])
def test_so_it_is_on_a_machine_that_has_not_the_main_worker(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setenv("FIRST", first)
    # Where torchrun would start them again.
    monkeypatch.setenv("RESTARTS", "1")
    launch(folder, LIVE_ON, leaving() + LIVE_ON)
    assert nothing_lives()


def test_a_torchrun_that_waits_for_a_machine_that_does_not_end_is_ended_once_the_main_worker_has(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BARRIER", "600")
    launch(folder, leaving(after_s=2 * LIMIT_S), "pass")
    assert nothing_lives()


def test_one_that_waits_for_the_main_workers_machine_is_left_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BARRIER", str(3 * LIMIT_S))
    monkeypatch.setenv("FIRST", "1")
    assert launch(folder, leaving(after_s=LIMIT_S / 2)) > 3 * LIMIT_S


def test_as_long_as_the_main_worker_is_at_the_models_registration_nobody_is_ended(folder: RunFolder) -> None:
    assert launch(folder, leaving(after_s=3 * LIMIT_S), LIVE_ON) > 3 * LIMIT_S
    assert nothing_lives()


def test_a_worker_alone_that_a_signal_has_stopped_is_ended_and_the_job_says_why(folder: RunFolder) -> None:
    with pytest.raises(JobError, match=r"^worker 0 stood still for 1\.2 s, stopped by a signal such as SIGSTOP; "):
        launch(folder, FREEZE)
    assert nothing_lives()


def test_a_main_worker_stopped_while_it_registers_the_model_is_no_success(folder: RunFolder) -> None:
    with pytest.raises(JobError, match=r"^worker 0 stood still") as caught:
        launch(folder, leaving() + FREEZE)
    assert caught.value.exit_code == 8


def test_that_an_earlier_run_has_left_a_summary_ends_nobody(folder: RunFolder) -> None:
    folder.write("summary.json", {})
    assert launch(folder, "pass", f"import time; time.sleep({3 * LIMIT_S})") > 3 * LIMIT_S


def test_an_error_that_a_worker_has_told_is_the_jobs_end_all_the_same(folder: RunFolder) -> None:
    told = json.dumps({"type": "StorageError", "message": "the disk is full", "exit_code": 7})
    program = leaving() + f"open('runs/job/error.json', 'w').write({told!r})"
    with pytest.raises(JobError):
        launch(folder, program, LIVE_ON)


def test_whoever_is_stopped_beside_one_that_works_is_left_to_that_one(folder: RunFolder) -> None:
    """It names the missing one at the end of `timeout_s`, with stacks; ended before, there would be less to say."""
    works = f"""
import os, signal, time
while not os.path.exists("pid1"): time.sleep(0.01)
time.sleep({3 * LIMIT_S})
os.kill(int(open("pid1").read()), signal.SIGCONT)
"""
    assert launch(folder, works, FREEZE) > 3 * LIMIT_S


def test_one_that_is_stopped_for_a_moment_now_and_then_goes_on(folder: RunFolder) -> None:
    works = """
import os, signal, time
worker = os.getpid()
if os.fork():
    os.wait()
else:
    for _ in range(5):
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.25 * LIMIT)
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.5 * LIMIT)
"""
    launch(folder, works.replace("LIMIT", str(LIMIT_S)))
