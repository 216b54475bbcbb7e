"""How a worker process begins and ends, whatever it does: its configuration, its log, and the word on why it failed."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from service import config
from service.config import TrainingConfig
from service.errors import JobError, LorotError, StorageError, SucceededError, TakenError
from service.run_folder import RunFolder
from service.training import console, distributed, pulse
from service.training.signals import Stopped

_log = logging.getLogger(__name__)


def enter(
    path: str, overrides: Sequence[str], body: Callable[[TrainingConfig, RunFolder, IO[str] | None], None]
) -> int:
    """Run `body(job, run folder, terminal on the main worker)` and end the process.

    Where it cannot begin it returns the exit code. An error is written to the log and to the run folder first. That the
    folder is another job's is told here only, not in that job's folder.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        job = config.load_any(path, list(overrides))
        folder = RunFolder(job.folder)
        folder.make()
    except LorotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        terminal = console.capture(folder.log(rank))
    except OSError as error:
        print(f"error: {folder.path}: cannot be written ({error.strerror})", file=sys.stderr)
        return StorageError.exit_code
    code = 0
    try:
        body(job, folder, terminal if rank == 0 else None)
    except BaseException as ended:
        reason = distributed.explained(ended)
        is_others = isinstance(reason, TakenError | SucceededError)
        if isinstance(reason, StorageError) and not is_others:
            folder.make_room()
        _log.exception("this worker ends here")
        said = str(reason)
        if not is_others:
            folder.report_error(JobError(said, reason.exit_code) if isinstance(reason, Stopped) else reason)
            said = folder.read(folder.error.name).get("message", said)
        if rank == 0 and (is_others or "LOROT_LAUNCHED" not in os.environ):
            # Without `lorot train`, which says what is in the folder, nobody else would.
            terminal.write(f"error: {said}\n")
        code = reason.exit_code if isinstance(reason, LorotError | Stopped) else 1
    return distributed.leave(code, terminal)


def note_meeting(folder: RunFolder) -> None:
    """Write down where a machine that comes back belongs to; the main worker does, once the folder is its own."""
    folder.note_meeting(os.environ.get("TORCHELASTIC_RUN_ID", "") if pulse.VARIABLE in os.environ else "")


def forget_earlier(folder: RunFolder) -> None:
    """Remove the error of an attempt before this process's; the main worker does, once the folder is its own.

    A launcher that starts its workers once has done so itself.
    """
    restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarted or "LOROT_LAUNCHED" not in os.environ:
        folder.forget_error(before=_began_s())


def _began_s() -> float:
    """When this process began, seconds since the epoch, to a hundredth.

    psutil's `create_time` counts from the whole second in which the machine began, so it is up to one too early, and
    torchrun starts a worker a tenth of one after another has left its last word.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
