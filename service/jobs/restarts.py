"""Whether a job whose workers are started again is worth going on with. Imports no torch."""

import signal
from pathlib import Path

from pipelines.errors import UnreachableError
from service.errors import REQUEUE, ConfigError, LostPeerError, stop_code
from service.jobs import torchrun
from service.jobs.torchrun import Exit
from service.run_folder import RunFolder

# Wrong input, bad data, a loss that is not finite, no usable checkpoint, no server, a full disk: they would come again.
FINAL = frozenset({2, 3, 4, 5, 6, 7})
# Of a worker that was asked to stop.
STOPPED = frozenset({REQUEUE, stop_code(signal.SIGINT)})


class Account:
    """Failures of this machine's own workers since the last checkpoint; a machine that comes or goes costs nothing.

    That another job has the folder is no worker's word in error.json, which is that job's. Of several machines a lost
    one may seem to have it for a while, so they try again.

    Args:
        allowed: so many failures in a row, without a new checkpoint between them, are restarted.
        log: of torchrun; read from `offset` bytes on.
        alone: this machine is the whole job, so a stop that was asked for is the job's, and so is a worker lost.
    """

    def __init__(self, folder: RunFolder, log: Path, offset: int, allowed: int, alone: bool) -> None:
        self._folder, self.log, self._offset = folder, log, offset
        self._allowed, self._alone = allowed, alone
        self._seen = 0
        self._progress = ""
        self.failed: list[Exit] = []

    def is_over(self) -> bool:
        """Whether to end the job here: no restart would mend it, or too many did not."""
        told = self._folder.read(self._folder.error.name)
        code = told.get("exit_code")
        # Storage that did not answer may do so again.
        if code in FINAL and told.get("type") != UnreachableError.__name__:
            return True
        newest = max((path.name for path in self._folder.checkpoints.glob("step-*")), default="")
        if newest > self._progress:
            self._progress, self.failed = newest, []
        found = torchrun.exits(self.text())
        ends = [end.code for end in found[self._seen :]]
        free = {REQUEUE} if self._alone else {REQUEUE, LostPeerError.exit_code}
        self.failed += [end for end in found[self._seen :] if end.code not in free]
        self._seen = len(found)
        # Where nothing can be written, no worker can say so in error.json.
        if ends and self._folder.is_read_only:
            return True
        # Who failed first: torchrun asks the others to stop, and what they say of that is no stop of the job.
        if self._alone and not STOPPED.union({ConfigError.exit_code}).isdisjoint(ends):
            return True
        return len(self.failed) > self._allowed

    def complaint(self) -> str:
        """What to say of more failures than are restarted; empty if there were not so many, or any else is to blame."""
        if len(self.failed) <= self._allowed:
            return ""
        last = self.failed[-1]
        how = f"exit code {last.code}" if last.code >= 0 else f"signal {-last.code}"
        since = self._progress or "the start"
        return (
            f"workers of this machine failed {len(self.failed)} times since {since}, and {self._allowed} failures in a "
            f"row are restarted (--max-restarts); the last one was its worker {last.local_rank}, by {how}"
        )

    def text(self) -> str:
        """What torchrun has written since this job began."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")
