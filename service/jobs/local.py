"""A training job on this machine: torchrun and its workers as child processes. Imports no torch."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import IO

import psutil

from service import config, machine, splits, tracking
from service.config import JobConfig
from service.errors import ConfigError, JobError, StorageError
from service.run_folder import RunFolder

WORKER = "service.training.worker"
LOG = "torchrun.log"
_LOCK = "launcher.lock"
_TAIL_LINES = 15
# torchrun gives workers this long after a signal, then kills them. It has to outlast the saving of a checkpoint.
_SHUTDOWN_S = 120

# What torchrun writes of each worker that failed, and of those it killed itself because they did not stop in time.
_FAILURE = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")
_TRACEBACK = 'Traceback (most recent call last):\n  File "<frozen runpy>"'
_FORCED = re.compile(r"Unable to shutdown process (\d+) via")

_LIKELY_CAUSES = {
    signal.SIGKILL: "most likely memory ran out; a smaller micro_batch, fewer workers or data.prefetch=1 need less",
    signal.SIGBUS: "most likely /dev/shm is full; start the container with a larger --shm-size",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGILL: "a library was built for another processor",
    signal.SIGABRT: "a check in native code failed",
}


@dataclass(frozen=True)
class Death:
    """A worker that ended by a signal."""

    rank: int
    pid: int
    signal: int

    def __str__(self) -> str:
        with contextlib.suppress(ValueError):
            number = signal.Signals(self.signal)
            cause = _LIKELY_CAUSES.get(number)
            return f"worker {self.rank} was ended by {number.name} (signal {self.signal})" + (
                f": {cause}" if cause else ""
            )
        return f"worker {self.rank} was ended by signal {self.signal}"


def run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    resume: bool = False,
    restart: bool = False,
    port: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> JobConfig:
    """Train as the configuration says, and return it when the job has ended well.

    What can go wrong early goes wrong here, before any worker starts: the configuration, the data, the tracking server,
    the port. The workers share this process's terminal; torchrun's own messages go to `torchrun.log` in the run folder.
    SIGINT and SIGTERM are passed on and awaited; a second SIGINT kills.

    Args:
        path: configuration file.
        overrides: `key.sub=value`.
        workers: processes; None: `config.workers`, or one per GPU, or one.
        resume: go on from the newest good checkpoint.
        restart: set an earlier run in the folder aside, as NAME.1, and begin anew.
        port: for the workers' rendezvous; None: a free one.
        say: is told what is being done, in a few words.

    Raises:
        LorotError: what a worker reported, with its exit code.
        JobError: a worker died without a word, or the job was interrupted (exit code 128 + signal).
    """
    job = config.load(path, list(overrides))
    folder = RunFolder(job.folder)
    if resume and restart:
        raise ConfigError("--resume goes on with the earlier run, --restart sets it aside: give one of them")
    count = num_workers(job, workers)
    config.accumulation_steps(job, count)
    if port is not None and not machine.port_is_free(port):
        raise ConfigError(f"port {port} is in use by another program; leave --port away, and a free one is taken")
    if not restart:
        folder.claim(resume)
    say("looking at the tracking database and the data")
    if not (resume and folder.read("run.json")):
        # Going on with a run needs no server: its records wait on disk.
        tracking.ensure_ready(job.tracking.uri)
    found = splits.announcement(splits.load(job))
    if restart:
        with _claimed(folder.path):
            folder.set_aside()
    say(f"starting {count} worker{'s' if count > 1 else ''}; what libraries print goes to {folder.log(0)}")
    launch(folder, command(path, overrides, workers=count, resume=resume, port=port), count, {splits.VARIABLE: found})
    return job


def launch(folder: RunFolder, line: list[str], workers: int, told: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a command line of `command` to its end, with the run folder claimed; raises what `run` does.

    Args:
        told: environment variables for the workers, on top of `environment`.
    """
    with _claimed(folder.path) as lock, (folder.path / LOG).open("w") as log:
        folder.error.unlink(missing_ok=True)
        code, interrupted = _supervise(line, {**environment(workers), **told}, log, lock)
    if code:
        raise failure(folder, code, interrupted)


def num_workers(job: JobConfig, asked: int | None = None) -> int:
    """Worker processes for this machine: as asked, as configured, or one per GPU and one on a CPU."""
    if asked is not None and asked < 1:
        raise ConfigError(f"--workers {asked}: a job needs at least one worker")
    return asked or job.workers or (machine.gpus() if job.device != "cpu" else 0) or 1


def command(
    path: Path | str,
    overrides: Sequence[str],
    *,
    workers: int,
    resume: bool = False,
    port: int | None = None,
    module: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """The torchrun command line that starts the workers: training's, or another module's with its own options."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(workers)]
    # Without an address of its own torchrun looks up this machine's name, which may be slow or lead elsewhere.
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port or 0}", "--local-addr", "127.0.0.1"]
    launcher += ["--shutdown-timeout", str(_SHUTDOWN_S)]
    return [*launcher, "-m", module or WORKER, str(path), *overrides, *options, *(["--resume"] if resume else [])]


def environment(workers: int) -> dict[str, str]:
    """This process's environment with what the workers need; what the user has set stays."""
    here = dict(os.environ)
    # The workers leave it to this process to say why they failed.
    here["LOROT_LAUNCHED"] = "1"
    here.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // workers)))
    here.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # All workers are on this machine; by name lookup gloo may pick an address that nothing answers at.
    here.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # DeepSpeed compiles with the ninja beside this interpreter, which an environment that was not activated hides.
    here["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), here.get("PATH", os.defpath)])
    return here


def failure(folder: RunFolder, code: int, interrupted: int) -> JobError:
    """The error that tells why the job ended with torchrun's exit `code`, or by the signal `interrupted` (0: none)."""
    log = (folder.path / LOG).read_text(errors="replace")
    reported = _reported(folder)
    lost = deaths(log)
    if interrupted and reported is not None and reported.exit_code != 1:
        # Either that it stopped as it was asked to, or why it could not save.
        return reported
    if interrupted:
        name = signal.Signals(interrupted).name
        return JobError(f"stopped by {name}; --resume goes on from the last checkpoint", 128 + interrupted)
    if lost:
        # A worker that was lost makes the others fail too; theirs is not the cause.
        return JobError(f"{lost[0]}\n{_tail(log, folder, lost[0].rank)}")
    if reported is not None:
        return reported
    return JobError(f"torchrun ended with exit code {code}, and no worker said why\n{_tail(log, folder)}")


def deaths(log: str) -> list[Death]:
    """The workers that a signal ended, by torchrun's log, without those that torchrun itself had stopped."""
    forced = {int(pid) for pid in _FORCED.findall(log)}
    found = [Death(int(rank), int(pid), -int(code)) for rank, code, pid in _FAILURE.findall(log)]
    return [death for death in found if death.signal > 0 and death.signal != signal.SIGTERM and death.pid not in forced]


def _reported(folder: RunFolder) -> JobError | None:
    told = folder.read(folder.error.name)
    if not isinstance(told.get("message"), str) or not isinstance(told.get("exit_code"), int):
        return None
    return JobError(told["message"], told["exit_code"])


def _tail(log: str, folder: RunFolder, rank: int = 0) -> str:
    """The last lines in which a worker says something, of torchrun's log or else of worker `rank`'s."""
    # What torchrun says itself: a last traceback with the table of failures, and lines that begin like W1122 02:17:56.
    own = log[: log.rfind(_TRACEBACK)] if _TRACEBACK in log else log
    lines = [line for line in own.splitlines() if line.strip() and not re.match(r"[IWE]\d{4} \d\d:", line)]
    worker = folder.log(rank)
    if not lines and worker.exists():
        lines = [line for line in worker.read_text(errors="replace").splitlines() if line.strip()]
    shown = "".join(f"  | {line}\n" for line in lines[-_TAIL_LINES:])
    return f"{shown}the logs are in {folder.path}: {LOG}, log-rank*.txt"


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[int]:
    """Hold the run folder for one job; yields the lock's descriptor, which torchrun keeps open as long as it lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); output=FOLDER chooses another") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another job runs there; wait for its end, or give this one name=OTHER"
            ) from None
        yield lock
    finally:
        os.close(lock)


def _supervise(line: list[str], env: dict[str, str], log: IO[str], lock: int) -> tuple[int, int]:
    """Run `line` to its end; returns its exit code and the first signal that asked this process to stop, or 0."""
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        again = number in received
        received.append(number)
        if child is not None:
            _stop(child.pid, signal.SIGKILL if again and number == signal.SIGINT else number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A session of its own: Ctrl-C in a terminal reaches the workers once, through torchrun, not twice.
        child = subprocess.Popen(
            line, env=env, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(lock,), start_new_session=True
        )
        if received:
            _stop(child.pid, received[0])
        return child.wait(), received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(pid: int, number: int) -> None:
    """Send torchrun a signal, which it passes on; SIGKILL, which it cannot pass on, goes to its workers as well."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        family = [*launcher.children(recursive=True), launcher] if number == signal.SIGKILL else [launcher]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
