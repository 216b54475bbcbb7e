"""A training job, or this machine's part of one: torchrun and its workers as child processes. Imports no torch."""

import contextlib
import fcntl
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from service import config, holder, machine, ownership, plain_files, splits, tracking
from service.config import TrainingConfig
from service.errors import (
    EXIT_CODES,
    REQUEUE,
    ConfigError,
    JobError,
    LostPeerError,
    StorageError,
    TakenError,
    stop_code,
)
from service.jobs import nodes as machines
from service.jobs import outcome, torchrun
from service.jobs.nodes import Nodes
from service.jobs.restarts import STOPPED, Account
from service.jobs.stillness import Stillness
from service.jobs.supervision import OWN_S, passing_on, supervise
from service.run_folder import RunFolder

WORKER = torchrun.WORKER
_TAIL_LINES = 15
# For a tracking server to answer before a job is started.
_TRACKING_S = 20.0
# Of workers that may have ended only because another one did.
_CAUSED = {REQUEUE, LostPeerError.exit_code}
# How torchrun's last traceback tells that this machine's workers cannot be among the job's any more.
_MEETING = {
    "RendezvousClosedError": "the job has ended at this rendezvous; another one there needs another --run-id",
    "RendezvousTimeoutError": "too few machines came to the rendezvous",
    "RendezvousConnectionError": "the rendezvous cannot be reached any more: it has ended, or the way there is down",
}
_TRACEBACK = 'Traceback (most recent call last):\n  File "<frozen runpy>"'


def run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    resume: bool = False,
    restart: bool = False,
    port: int | None = None,
    nnodes: str | None = None,
    rdzv: str | None = None,
    run_id: str | None = None,
    max_restarts: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> TrainingConfig:
    """Train as the configuration says, and return it when the job has ended well.

    What can go wrong early goes wrong here, before any worker starts: the configuration, the data, the tracking server,
    the port. The workers share this process's terminal; torchrun's own messages go to `torchrun.log` in the run folder.
    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on, once, and awaited; a second SIGINT kills.

    With `nnodes` this is one machine's part: each machine of the job runs the same, with the same run folder.

    Args:
        path: configuration file.
        overrides: `key.sub=value`.
        workers: processes on this machine; None: `config.workers`, or one per GPU, or one.
        resume: go on from the newest good checkpoint. Several machines always go on with their own run.
        restart: set an earlier run in the folder aside, as NAME.1, and begin anew.
        port: for the workers' rendezvous on one machine; None: a free one.
        nnodes: "MIN:MAX" machines, or one number; None: this one alone.
        rdzv: "HOST:PORT" of `lorot rendezvous`, where several machines meet.
        run_id: the job's name there; None: the run's.
        max_restarts: failures in a row of this machine's own workers that are restarted, counted anew at each
            checkpoint; None: 0 on one machine, 3 on each of several.
        say: is told what is being done, in a few words.

    Raises:
        LorotError: what a worker reported, with its exit code.
        JobError: a worker died without a word, or the job was stopped by a signal (exit code 130 or 75).
    """
    job = config.load_any(path, list(overrides))
    folder = RunFolder(job.folder)
    if resume and restart:
        raise ConfigError("--resume goes on with the earlier run, --restart sets it aside: give one of them")
    nodes = _nodes(job, nnodes, rdzv, run_id, restart, port)
    count = num_workers(job, workers)
    machines.workers_of_all(job, nodes, count)
    if port is not None and not machine.port_is_free(port):
        raise ConfigError(f"port {port} is in use by another program; leave --port away, and a free one is taken")
    if nodes is not None:
        # A machine that comes back finds the run that it was part of, and goes on with it.
        if folder.meeting != nodes.run_id:
            _refuse_if_owned(folder, nodes.run_id)
        # Read anew: a fellow may have begun during that look.
        begun = folder.meeting == nodes.run_id
        resume = resume or (begun and not folder.end)
    if not restart:
        folder.claim(resume)
    say("looking at the tracking database and the data")
    if not (resume and folder.read("run.json")):
        # Going on with a run needs no server: its records wait on disk. A busy one is no reason to end a job.
        tracking.ensure_ready(job.tracking.uri, _TRACKING_S)
    found = splits.announcement(splits.load(job))
    if nodes is None:
        with _claimed(folder.path):
            # The workers of a plain torchrun, which hold no lock of a launcher.
            ownership.refuse_if_owned(folder.path)
            if restart:
                folder.set_aside()
    if nodes is not None:
        machines.await_rendezvous(nodes, say)
        resume = True
    allowed = max_restarts if max_restarts is not None else 0 if nodes is None else 3
    line = torchrun.command(
        path,
        overrides,
        workers=count,
        shutdown_s=job.shutdown_s,
        resume=resume or allowed > 0,
        port=port,
        module=WORKER,
        nodes=nodes,
        restarts=allowed > 0,
    )
    say(f"starting {count} worker{'s' if count > 1 else ''}; what libraries print goes to {folder.log(0)}")
    told = {splits.VARIABLE: found}
    launch(folder, line, count, told, nodes=nodes, restarts=allowed, grace_s=job.grace_s, timeout_s=job.timeout_s)
    return job


def launch(
    folder: RunFolder,
    line: list[str],
    workers: int,
    told: Mapping[str, str] = MappingProxyType({}),
    *,
    nodes: Nodes | None = None,
    restarts: int = 0,
    grace_s: float = math.inf,
    timeout_s: float = math.inf,
) -> None:
    """Run a command line of `torchrun.command` to its end, with the run folder claimed; raises what `run` does.

    Args:
        told: environment variables for the workers, on top of `torchrun.environment`.
        nodes: as for the command line.
        restarts: failures in a row that are restarted; the command line says that at all.
        grace_s: seconds from a signal to the end of all this, whatever still runs or does not answer.
        timeout_s: how long workers may stand still that no other worker waits for.
    """
    own = f"-{nodes.address}" if nodes is not None else ""
    # To the very end: a signal that is repeated may not keep the run's end out of its record.
    with passing_on(grace_s) as signals:
        with _claimed(folder.path, own) as lock, (folder.path / f"torchrun{own}.log").open("ab") as log:
            folder.error.unlink(missing_ok=True)
            account = Account(folder, Path(log.name), log.tell(), restarts, alone=nodes is None)
            # Without restarts torchrun ends by itself.
            over = account.is_over if nodes is not None or restarts else None
            environment = {**torchrun.environment(workers, nodes), **told}
            still = Stillness(folder, timeout_s)
            code, interrupted = supervise(line, environment, log, lock, signals, still, over)
        if still.is_over and not folder.error.exists():
            # All was done: who was still to end has ended, by force.
            return
        if code:
            error = failure(folder, account, code, interrupted, still)
            if not holder.is_launched(folder.path):
                # Of several machines the last one says it; the others may go on.
                outcome.settle(folder, error, max(OWN_S / 2, signals.left_s - OWN_S / 2))
            raise error


def _nodes(
    job: TrainingConfig, nnodes: str | None, rdzv: str | None, run_id: str | None, restart: bool, port: int | None
) -> Nodes | None:
    """The machines of the job; None for this one alone."""
    if nnodes is None:
        given = {"--rdzv": rdzv, "--run-id": run_id}
        if unused := [name for name, value in given.items() if value]:
            raise ConfigError(f"{unused[0]} is for jobs of several machines; add --nnodes MIN:MAX, or leave it away")
        return None
    if restart:
        raise ConfigError(
            "--restart: each machine would set aside what another has begun; choose name=OTHER, or move the run "
            "folder away before the machines start"
        )
    if port is not None:
        raise ConfigError("--port is for one machine; several meet at --rdzv HOST:PORT")
    return machines.describe(nnodes, rdzv, run_id or job.name)


def _refuse_if_owned(folder: RunFolder, run_id: str) -> None:
    """Raise TakenError if the folder is a job's that meets under another name: nothing of it may be touched."""
    for is_last in (False, True):
        try:
            ownership.refuse_if_owned(folder.path)
            return
        except TakenError:
            # Who has the folder writes the name down; by now it may be another machine of this job.
            if folder.meeting == run_id:
                return
            if is_last:
                raise
        # Or one that looks just as this one does, all machines of a job at once: a look takes the folder for a moment.
        time.sleep(random.uniform(0, 2))


def num_workers(job: TrainingConfig, asked: int | None = None) -> int:
    """Worker processes for this machine: as asked, as configured, or one per GPU and one on a CPU."""
    if asked is not None and asked < 1:
        raise ConfigError(f"--workers {asked}: a job needs at least one worker")
    return asked or job.workers or (machine.gpus() if job.device != "cpu" else 0) or 1


def failure(
    folder: RunFolder, account: Account, code: int, interrupted: int, still: Stillness | None = None
) -> JobError:
    """The error that tells why the job ended with torchrun's exit `code`, or by the signal `interrupted` (0: none)."""
    log = account.text()
    reported = _reported(folder)
    lost = torchrun.deaths(log)
    if interrupted and reported is not None and reported.exit_code != 1:
        # Either that it stopped as it was asked to, or why it could not save.
        return reported
    if interrupted:
        name = signal.Signals(interrupted).name
        return JobError(f"stopped by {name}; --resume goes on from the last checkpoint", stop_code(interrupted))
    if reported is None and folder.is_read_only:
        return JobError(
            f"{folder.path}: cannot be written; what is there is untouched: --resume goes on once it can be, or "
            f"output=FOLDER chooses another\n{_tail(log, account.log, folder)}",
            StorageError.exit_code,
        )
    first = [end.code for end in torchrun.exits(log)[-1:]]
    if reported is not None and reported.exit_code == REQUEUE and not {*STOPPED, *_CAUSED}.issuperset(first):
        # Only because torchrun asked it to stop, after another had failed without a word.
        reported = None
    blamed = [end.pid for end in account.failed[-1:]] or [death.pid for death in lost[:1]]
    frozen = still.explain(blamed[0]) if still is not None and blamed else ""
    if complaint := account.complaint():
        if frozen:
            complaint = f"{frozen}; {complaint}"
        if reported is not None and reported.exit_code not in _CAUSED - {account.failed[-1].code}:
            return JobError(f"{complaint}\n{reported}", reported.exit_code)
        return JobError(f"{complaint}\n{_tail(log, account.log, folder)}")
    if STOPPED.intersection(first) and (reported is None or reported.exit_code == 1):
        # A signal to one worker, before it had a place to write to.
        return JobError("a worker was stopped by a signal; --resume goes on from the last checkpoint", first[0])
    if lost:
        # A worker that was lost makes the others fail too; theirs is not the cause.
        said = _tail(log, account.log, folder, lost[0].rank)
        if frozen:
            return JobError(f"{frozen}; --resume goes on from the last checkpoint\n{said}", LostPeerError.exit_code)
        return JobError(f"{lost[0]}\n{said}")
    end = log[log.rfind(_TRACEBACK) :]
    for sign, meaning in _MEETING.items():
        if sign in end:
            return JobError(f"{meaning}; what torchrun says is in {account.log}", LostPeerError.exit_code)
    if reported is not None:
        return reported
    # As for one that may not write to the folder, which is another job's.
    told = first[0] if first and first[0] in EXIT_CODES else 1
    return JobError(
        f"torchrun ended with exit code {code}, and no worker said why\n{_tail(log, account.log, folder)}", told
    )


def _reported(folder: RunFolder) -> JobError | None:
    told = folder.read(folder.error.name)
    if not isinstance(told.get("message"), str) or not isinstance(told.get("exit_code"), int):
        return None
    return JobError(told["message"], told["exit_code"])


def _tail(log: str, place: Path, folder: RunFolder, rank: int = 0) -> str:
    """The last lines in which a worker says something, of torchrun's log or else of worker `rank`'s."""
    # What torchrun says itself: a last traceback with the table of failures, and lines that begin like W1122 02:17:56.
    own = log[: log.rfind(_TRACEBACK)] if _TRACEBACK in log else log
    lines = [line for line in own.splitlines() if line.strip() and not re.match(r"[IWE]\d{4} \d\d:", line)]
    worker = folder.log(rank)
    if not lines and worker.exists():
        lines = [line for line in worker.read_text(errors="replace").splitlines() if line.strip()]
    shown = "".join(f"  | {line}\n" for line in lines[-_TAIL_LINES:])
    return f"{shown}the logs are in {folder.path}: {place.name}, log-rank*.txt"


@contextlib.contextmanager
def _claimed(folder: Path, own: str = "") -> Iterator[int]:
    """Hold the run folder for one job; yields the lock's descriptor, which torchrun keeps open as long as it lives.

    Of several machines each has a lock of its `own`; that they are of one job is their rendezvous's business.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"launcher{own}.lock"
        lock = plain_files.regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); output=FOLDER chooses another") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ownership.refusal(folder, ownership.read(path)) from None
        except OSError:
            # A file system without locks: the owner's sign of life decides.
            pass
        # For whoever is refused; a full disk is no reason to refuse this one.
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(ownership.here()).encode(), 0)
        yield lock
    finally:
        os.close(lock)
