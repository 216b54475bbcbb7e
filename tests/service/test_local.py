"""Starting a job on this machine: real torchrun, with small stand-ins for the worker."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from pipelines import amounts
from service import config, holder, machine, ownership
from service.errors import ConfigError, JobError, LorotError, TakenError, TrackingError
from service.jobs import local, torchrun
from service.run_folder import RunFolder
from tests.integration.processes import lives

ROOT = Path(__file__).parents[2]
CONFIG = """
name: job
workers: 2
global_batch: 8
micro_batch: 4
data: {name: demo, root: drawn, size: 32, options: {train_count: 12, val_count: 10, size: 48}}
tracking: {uri: "sqlite:///unused.db"}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration in it, the working folder; the tracking database is taken to be there."""
    (tmp_path / "job.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local.tracking, "ensure_ready", lambda *_: None)
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    """Let workers run `program` (with `rank` known) instead of training."""
    (folder / "stand_in.py").write_text("import os, sys\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(program))
    monkeypatch.setattr(local, "WORKER", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_every_worker_gets_the_configuration_and_its_share_of_the_cores(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stand_in(
        monkeypatch,
        here,
        """
        import json, pathlib
        wanted = ("WORLD_SIZE", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "MASTER_ADDR")
        told = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in wanted}}
        pathlib.Path(f"rank{rank}.json").write_text(json.dumps(told))
        """,
    )
    job = local.run("job.yaml", ["seed=7"], resume=True)
    assert job.seed == 7
    for rank in range(2):
        assert json.loads((here / f"rank{rank}.json").read_text()) == {
            "arguments": ["job.yaml", "seed=7", "--resume"],
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": str(max(1, machine.cores() // 2)),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }


def test_what_a_worker_reports_becomes_the_commands_message_and_exit_code(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        here,
        """
        import json, pathlib
        told = {"type": "NonFiniteLossError", "message": "step 12: the loss is nan", "exit_code": 4}
        pathlib.Path("runs/job/error.json").write_text(json.dumps(told))
        sys.exit(4)
        """,
    )
    with pytest.raises(JobError, match="step 12: the loss is nan") as caught:
        local.run("job.yaml")
    assert caught.value.exit_code == 4


def test_a_worker_that_is_killed_is_named_with_the_signal_and_the_likely_cause(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        here,
        """
        import json, pathlib, signal, time
        def fail(number, frame):
            told = {"type": "DistError", "message": "connection closed by peer", "exit_code": 1}
            pathlib.Path("runs/job/error.json").write_text(json.dumps(told))
            sys.exit(1)
        if rank == 1:
            while not pathlib.Path("ready").exists():
                time.sleep(0.01)
            print("allocating the last page", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        # Asked to stop by torchrun, when that has seen the other's death.
        signal.signal(signal.SIGTERM, fail)
        pathlib.Path("ready").touch()
        while True:
            signal.pause()
        """,
    )
    with pytest.raises(JobError) as caught:
        local.run("job.yaml")
    message = str(caught.value)
    assert message.startswith("worker 1 was ended by SIGKILL (signal 9): most likely memory ran out")
    assert "allocating the last page" in message
    assert "connection closed" not in message
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_reaches_the_workers_once_and_is_awaited(here: Path, number: signal.Signals, exit_code: int) -> None:
    (here / "stand_in.py").write_text(
        textwrap.dedent("""
        import os, pathlib, signal, time
        rank = os.environ["RANK"]
        def stop(number, frame):
            with pathlib.Path(f"stopped{rank}").open("a") as file:
                file.write(f"{number} ")
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
            pathlib.Path(f"ended{rank}").touch()
            raise SystemExit(1)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, stop)
        signal.signal(signal.SIGHUP, stop)
        pathlib.Path(f"started{rank}").touch()
        time.sleep(120)
        """)
    )
    program = textwrap.dedent("""
        from service.jobs import local
        local.WORKER = "stand_in"
        local.tracking.ensure_ready = lambda *_: None
        try:
            local.run("job.yaml")
        except local.JobError as error:
            print(error)
            raise SystemExit(error.exit_code)
        """)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    line = [sys.executable, "-c", program]
    launcher = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: all((here / f"started{rank}").exists() for rank in range(2)), launcher)
        # To the whole process group, as Ctrl-C in a terminal does.
        os.killpg(launcher.pid, number)
        if number != signal.SIGINT:
            # A second Ctrl-C kills; other signals may come as often as they like.
            wait_for(lambda: all((here / f"stopped{rank}").exists() for rank in range(2)), launcher)
            for again in (number, signal.SIGTERM, signal.SIGUSR1):
                os.killpg(launcher.pid, again)
        (here / "go").touch()
        said, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == exit_code
    assert f"stopped by {number.name}" in said
    for rank in range(2):
        assert (here / f"stopped{rank}").read_text() == f"{int(number)} "
        assert (here / f"ended{rank}").exists()


def test_torchrun_ends_with_its_launcher_instead_of_restarting_the_workers_for_ever(here: Path) -> None:
    (here / "stand_in.py").write_text(
        textwrap.dedent("""
        import os, pathlib, sys, time
        from service.training.signals import Signals
        signals = Signals()
        signals.listen()
        signals.defer()
        pathlib.Path("torchrun.pid").write_text(str(os.getppid()))
        with pathlib.Path("starts").open("a") as file:
            file.write("x")
        while not signals.number:
            time.sleep(0.01)
        sys.exit(75)
        """)
    )
    program = textwrap.dedent("""
        from service.jobs import local
        local.WORKER = "stand_in"
        local.tracking.ensure_ready = lambda *_: None
        local.run("job.yaml", ["workers=1"], max_restarts=3)
        """)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    try:
        wait_for(lambda: (here / "starts").exists(), launcher)
        agent = psutil.Process(int((here / "torchrun.pid").read_text()))
    finally:
        launcher.kill()
        launcher.wait()
    try:
        agent.wait(timeout=60)
        assert not holder.is_launched(here / "runs/job")
    finally:
        for process in [*agent.children(recursive=True), agent] if agent.is_running() else []:
            process.kill()


def wait_for(condition, process: subprocess.Popen, seconds: float = 100) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), "the launcher ended early"
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.05)


def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> tuple[int, int]:
        raise AssertionError("workers were started")

    monkeypatch.setattr(local, "supervise", refuse)


def test_a_port_in_use_is_told_before_anything_starts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_starts(monkeypatch)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            local.run("job.yaml", port=port)
    assert machine.port_is_free(port)


def test_what_is_wrong_with_batch_data_or_tracking_is_told_before_anything_starts(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_starts(monkeypatch)
    with pytest.raises(ConfigError, match="which 3 workers cannot share evenly"):
        local.run("job.yaml", workers=3)
    with pytest.raises(LorotError, match="absent") as caught:
        local.run("job.yaml", ["data={name: folder, root: absent}"])
    assert caught.value.exit_code == 3

    def silent(*_: object) -> None:
        raise TrackingError("nobody answers")

    monkeypatch.setattr(local.tracking, "ensure_ready", silent)
    with pytest.raises(TrackingError, match="nobody answers"):
        local.run("job.yaml")


def test_a_second_job_in_a_run_folder_is_told_which_process_of_which_machine_has_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
        from service.jobs import local
        local.tracking.ensure_ready = lambda *_: None
        try:
            local.run("job.yaml")
        except local.TakenError as error:
            print(error)
        """
    said: list[str] = []

    def start_another(*_: object) -> tuple[int, int]:
        line = [sys.executable, "-c", textwrap.dedent(program)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
        said.append(done.stdout + done.stderr)
        return 0, 0

    # Of an earlier job, with a longer number.
    (here / "runs/job").mkdir(parents=True)
    (here / "runs/job/launcher.lock").write_text('{"host": "a-machine-of-some-other-name", "pid": 4194304}')
    monkeypatch.setattr(local, "supervise", start_another)
    local.run("job.yaml")
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == [f"runs/job: another job runs there ({who}); wait for its end, or give this one name=OTHER\n"]


def test_a_folder_in_which_the_workers_of_a_plain_torchrun_write_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_starts(monkeypatch)
    monkeypatch.setattr(ownership, "WATCH_S", 0.5)
    folder = here / "runs/job"
    folder.mkdir(parents=True)
    (folder / "error.json").write_text('{"message": "of the other job"}')
    owner = ownership.Ownership(folder)
    owner.take()
    for resume in (False, True):
        with pytest.raises(TakenError, match=f"another job runs there \\(process {os.getpid()}"):
            local.run("job.yaml", resume=resume)
    assert "of the other job" in (folder / "error.json").read_text()
    owner.release()


def test_an_earlier_run_is_only_gone_on_with_or_set_aside_when_asked_to(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(local, "supervise", lambda line, *_: (started.append(line), (0, 0))[1])
    (here / "runs/job/checkpoints/step-00000010").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--resume goes on.*--restart"):
        local.run("job.yaml")
    with pytest.raises(ConfigError, match="give one of them"):
        local.run("job.yaml", resume=True, restart=True)
    assert started == []
    local.run("job.yaml", resume=True)
    assert (here / "runs/job/checkpoints/step-00000010").exists()
    local.run("job.yaml", restart=True)
    assert (here / "runs/job.1/checkpoints/step-00000010").exists()
    assert not (here / "runs/job/checkpoints").exists()
    assert [line[-1] for line in started] == ["--resume", "job.yaml"]


def test_a_signal_while_the_end_is_recorded_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setattr(local, "supervise", lambda *_: (1, signal.SIGTERM))
        monkeypatch.setattr(local.outcome, "settle", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(JobError, match="stopped by SIGTERM") as caught:
            local.run("job.yaml")
        assert caught.value.exit_code == 75
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "afterwards it means what it did before"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_does_not_end_is_killed_with_all_its_children_before_the_time_that_a_signal_leaves_is_over(
    here: Path,
) -> None:
    """As torchrun that waits for a rendezvous which does not answer."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "worker = os.fork()\n"
        "name = 'child' if worker else 'worker'\n"
        "pathlib.Path(name).write_text(str(os.getpid()))\n"
        "while worker and not pathlib.Path('worker').exists(): time.sleep(0.01)\n"
        "if worker: os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(120)\n"
    )
    folder = RunFolder(here / "runs/job")
    folder.make()
    with pytest.raises(JobError, match="stopped by SIGTERM") as caught:
        local.launch(folder, [sys.executable, "-c", program], 1, grace_s=3)
    assert caught.value.exit_code == 75
    begun = [int((here / name).read_text()) for name in ("child", "worker")]
    assert not any(lives(process) for process in psutil.process_iter() if process.pid in begun)


def test_what_does_not_heed_that_the_job_is_over_is_killed(here: Path) -> None:
    """As torchrun at its exit barrier, where another machine's main worker has failed for good."""
    program = (
        "import json, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "told = {'type': 'StorageError', 'message': 'the disk is full', 'exit_code': 7}\n"
        "open('runs/job/error.json', 'w').write(json.dumps(told))\n"
        "time.sleep(120)\n"
    )
    folder = RunFolder(here / "runs/job")
    folder.make()
    with pytest.raises(JobError, match="the disk is full") as caught:
        local.launch(folder, [sys.executable, "-c", program], 1, restarts=3, grace_s=3)
    assert caught.value.exit_code == 7


def test_an_error_of_an_earlier_attempt_is_not_reported_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "runs/job").mkdir(parents=True)
    (here / "runs/job/error.json").write_text('{"type": "X", "message": "old news", "exit_code": 4}')
    monkeypatch.setattr(local, "supervise", lambda *_: (1, 0))
    with pytest.raises(JobError, match="no worker said why") as caught:
        local.run("job.yaml")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("asked", "configured", "device", "gpus", "workers"),
    [
        (None, 0, "auto", 0, 1),
        (None, 0, "auto", 4, 4),
        (None, 0, "cpu", 4, 1),
        (None, 2, "auto", 4, 2),
        (3, 2, "auto", 4, 3),
    ],
)
def test_there_are_as_many_workers_as_asked_for_or_gpus_or_one(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, configured: int, device: str, gpus: int, workers: int
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    job = config.resolve({"workers": configured, "device": device, "data": {"name": "demo"}})
    assert local.num_workers(job, asked) == workers


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("0", 1), ("0,1,3", 3), ("-1", 0), ("0,-1,2", 1), ("GPU-ab12, GPU-cd34", 2)]
)
def test_gpus_are_counted_as_cuda_counts_the_visible_ones(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == count


def test_a_worker_that_torchrun_had_to_kill_is_not_taken_for_the_cause() -> None:
    log = """W Unable to shutdown process 41 via SIGTERM, forcefully exiting via SIGKILL
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 41)  (SIGKILL)
[2]:
  rank      : 2 (local_rank: 2)
  exitcode  : -15 (pid: 43)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 42)
"""
    assert torchrun.deaths(log) == []
    assert torchrun.deaths(log.replace("exitcode  : 1 (pid: 42)", "exitcode  : -11 (pid: 42)")) == [
        torchrun.Death(rank=1, pid=42, signal=11)
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (25_300_000_000, "25.3 GB"), (999_960, "1.0 MB")]
)
def test_bytes_are_shown_in_powers_of_a_thousand(count: int, text: str) -> None:
    assert amounts.shown_bytes(count) == text
