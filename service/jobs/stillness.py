"""Workers that stand still where no other worker waits for them: their machine's launcher does. Imports no torch.

While workers train they miss one that does not come. Nobody misses one that is alone, nor one that has nothing left to
do but to end, once the main worker has registered the model. Nor does anybody miss a torchrun that waits for another
machine's after that (`exit_barrier_timeout`, five minutes), which may have been ended by this.
"""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator

import psutil

from service.jobs.process_family import kill_family
from service.run_folder import RunFolder

# How often workers are looked at; more often where less time is allowed.
_EVERY_S = 5.0


class Stillness:
    """Ends what this machine has left of a job, if all of it has stood still for too long.

    A worker stands still that a signal such as SIGSTOP has stopped, or that lives on although the job is done; and so
    does a torchrun without workers then. It looks in a thread of its own, since a run folder may not answer.

    Args:
        limit_s: so long they may.

    Attributes:
        ended: the workers that were ended because a signal had stopped them, by process number: their ranks.
        is_over: what was ended stood still after the job was done: nothing is lost.
    """

    def __init__(self, folder: RunFolder, limit_s: float) -> None:
        self._folder, self._limit_s = folder, limit_s
        self._before = folder.end
        self._every_s = min(_EVERY_S, limit_s / 4)
        self._patience = Patience(limit_s, 2 * self._every_s)
        self._ranks: dict[psutil.Process, int] = {}
        self.ended: dict[int, int] = {}
        self.is_over = False

    @contextlib.contextmanager
    def watching(self, torchrun: int) -> Iterator[None]:
        """Look at the process `torchrun` and its workers now and then within the block."""
        closed = threading.Event()
        try:
            launcher = psutil.Process(torchrun)
        except psutil.NoSuchProcess:
            yield
            return

        def work() -> None:
            while not closed.wait(self._every_s):
                self.look(launcher, time.monotonic())

        threading.Thread(target=work, name="stillness", daemon=True).start()
        try:
            yield
        finally:
            closed.set()

    def look(self, launcher: psutil.Process, now_s: float) -> None:
        """Look once, at the time `now_s`, and end whoever has stood still for too long."""
        workers = self._workers(launcher)
        end = self._folder.end
        is_done = bool(end) and end != self._before
        still = [worker for worker in workers if is_done or _is_stopped(worker)]
        judged = [launcher] if is_done and not workers else still if len(still) == len(workers) else []
        if not self._patience.ends(now_s, judged):
            return
        if is_done:
            self.is_over = True
            # With torchrun, which would take them for failed, and start them again.
            kill_family(launcher)
            return
        for worker in still:
            self.ended[worker.pid] = self._ranks[worker]
            kill_family(worker)

    def explain(self, pid: int) -> str:
        """Why a worker was ended here; empty if it was not."""
        if pid not in self.ended:
            return ""
        return f"worker {self.ended[pid]} stood still for {self._limit_s:g} s, stopped by a signal such as SIGSTOP"

    def _workers(self, launcher: psutil.Process) -> list[psutil.Process]:
        """The children of torchrun that are its workers."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in launcher.children():
                with contextlib.suppress(psutil.Error):
                    if child not in self._ranks:
                        told = child.environ()
                        # Between fork and exec it still has the environment of torchrun, in which RANK may be.
                        if "TORCHELASTIC_RUN_ID" in told and "RANK" in told:
                            self._ranks[child] = int(told["RANK"])
                    if child in self._ranks and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child)
        return found


class Patience:
    """How long each of some things has been seen at every look.

    Args:
        limit_s: of that time.
        longest_s: between two looks; what is beyond was a pause of whoever looks, and does not count.
    """

    def __init__(self, limit_s: float, longest_s: float) -> None:
        self._limit_s, self._longest_s = limit_s, longest_s
        self._looked_s: float | None = None
        self._seen_s: dict[object, float] = {}

    def ends(self, now_s: float, seen: Collection[object]) -> bool:
        """Whether there are any, and all of them have been there for that long; whoever is not seen begins anew."""
        past_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, self._longest_s)
        self._looked_s = now_s
        self._seen_s = {one: self._seen_s[one] + past_s if one in self._seen_s else 0.0 for one in seen}
        return bool(self._seen_s) and min(self._seen_s.values()) >= self._limit_s


def _is_stopped(worker: psutil.Process) -> bool:
    # One that somebody looks into with a debugger has another status.
    with contextlib.suppress(psutil.Error):
        return bool(worker.status() == psutil.STATUS_STOPPED)
    return False
