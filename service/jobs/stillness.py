"""Workers that stand still where no other worker waits for them: their machine's launcher does. Imports no torch.

While workers train they miss one that does not come. Nobody misses one that is alone, nor one that has nothing left to
do but to end, while the main worker registers the model. Nor does anybody miss a torchrun that waits for another
machine's after that (`exit_barrier_timeout`, five minutes), which may have been ended by this.
"""

import contextlib
import time

import psutil

from service.run_folder import RunFolder

# How often workers are looked at; more often where less time is allowed.
_EVERY_S = 5.0


class Stillness:
    """How long all workers that this machine has left have stood still.

    One stands still that a signal such as SIGSTOP has stopped, or that lives on although the job has left its summary,
    unless it is the main worker; and so does a torchrun whose workers have ended then, the main one among them. Time in
    which this process was stopped itself does not count.

    Args:
        limit_s: so long one may.

    Attributes:
        ended: the workers that stood still for longer, by process number: their ranks.
        is_over: who was ended stood still after the job had left its summary, and was not the main worker: nothing is
            lost.
    """

    def __init__(self, folder: RunFolder, limit_s: float) -> None:
        self._summary, self._limit_s = folder.summary, limit_s
        self._before = self._left()
        self._every_s = min(_EVERY_S, limit_s / 4)
        self._looked_s = time.monotonic()
        self._still_s: dict[int, float] = {}
        self._ranks: dict[int, int] = {}
        # Among the workers that were here last.
        self._had_main = False
        self.ended: dict[int, int] = {}
        self.is_over = False

    def look(self, torchrun: int) -> list[psutil.Process]:
        """Who is to be killed, of the process `torchrun` and its workers: nobody, most of the time."""
        past_s = time.monotonic() - self._looked_s
        if past_s < self._every_s:
            return []
        self._looked_s += past_s
        has_left = self._left() != self._before
        launcher, workers = self._workers(torchrun)
        still = [worker for worker in workers if _is_stopped(worker) or (has_left and self._ranks[worker.pid])]
        if workers:
            self._had_main = any(self._ranks[worker.pid] == 0 for worker in workers)
        waits = not workers and has_left and self._had_main
        if launcher is None or len(still) < len(workers) or not (workers or waits):
            self._still_s = {}
            return []
        judged = [launcher.pid] if waits else [worker.pid for worker in still]
        self._still_s = {pid: self._still_s.get(pid, 0.0) + min(past_s, 2 * self._every_s) for pid in judged}
        if min(self._still_s.values()) < self._limit_s:
            return []
        self.ended |= {worker.pid: self._ranks[worker.pid] for worker in still}
        self.is_over = has_left and all(self._ranks[worker.pid] for worker in still)
        # Their torchrun would take them for failed, and start them again.
        return [*still, launcher] if self.is_over else still

    def explain(self, pid: int) -> str:
        """Why a worker was ended here; empty if it was not."""
        if pid not in self.ended:
            return ""
        return f"worker {self.ended[pid]} stood still for {self._limit_s:g} s, stopped by a signal such as SIGSTOP"

    def _left(self) -> tuple[int, int] | None:
        """The summary that is there."""
        with contextlib.suppress(OSError):
            found = self._summary.stat()
            return found.st_ino, found.st_mtime_ns
        return None

    def _workers(self, torchrun: int) -> tuple[psutil.Process | None, list[psutil.Process]]:
        """torchrun, and its children that are workers; none if it has ended."""
        found = []
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(torchrun)
            for child in launcher.children():
                with contextlib.suppress(psutil.Error):
                    if child.pid not in self._ranks and (rank := child.environ().get("RANK")):
                        self._ranks[child.pid] = int(rank)
                    if child.pid in self._ranks and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child)
            return launcher, found
        return None, []


def _is_stopped(worker: psutil.Process) -> bool:
    # One that somebody looks into with a debugger has another status.
    with contextlib.suppress(psutil.Error):
        return worker.status() == psutil.STATUS_STOPPED
    return False
