"""Ends a job that hangs, with each worker's last step and where it was: no worker waits for another in silence.

Each worker leaves a line in the run folder now and then: its step, what it is about, and the place in the code. The
folder outlives a worker that is frozen, and the machine of the main worker, where the workers' own store is.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from service.errors import JobError, LorotError, LostPeerError
from service.run_folder import RunFolder
from service.training import distributed
from service.training.distributed import World
from service.training.pulse import Pulse

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

# Opening a loader imports and compiles, and does so sooner on one worker than on another.
_OPENING_S = 600.0
# Lines at the inner end of a stack that are left out of a message, since they only say that it waits.
_SHOWN_FRAMES = 3
# For the report of a worker that ends: a disk that hangs is no reason to stay for ever.
_REPORT_S = 60.0


@dataclass(frozen=True)
class Sign:
    """What a worker said of itself last: `count` grows as long as it lives, `idle_s` since it went on."""

    rank: int
    count: int
    step: int
    phase: str
    idle_s: float
    place: str

    def __str__(self) -> str:
        return f"worker {self.rank}: step {self.step}, {self.phase} for {self.idle_s:.0f} s, at {self.place}"


class Watchdog:
    """Watches this worker's main thread from a thread of its own; a context around all that may hang.

    A worker that makes no progress for `timeout_s` writes its stack to its log and ends with a JobError in error.json.
    One that lost another, or waited too long for it, ends with a LostPeerError that tells of all workers. Of several
    machines it hears within seconds that one has vanished, whatever `timeout_s` is (`pulse`).

    While the workers start, one of them may index a data set or fetch a model for hours. What ends that is no clock but
    the silence of another worker: none of its lines for `timeout_s`. In `together`, where all wait for the first batch
    of a loader too, such a silence ends it as well, and so do ten minutes if all of them live.

    Args:
        folder: seen by all workers.
        timeout_s: without a step, a micro-batch or an evaluated batch; in `together` it is ten minutes if that is more.
            Everywhere it is the time that a worker may be silent.
    """

    def __init__(self, folder: RunFolder, world: World, timeout_s: float) -> None:
        self._folder, self._world, self._timeout_s = folder, world, timeout_s
        self._every_s = min(5.0, timeout_s / 10)
        self._place = folder.path / "workers"
        # Signs of an earlier attempt lie there too.
        self._attempt = distributed.from_main(uuid.uuid4().hex[:12] if world.is_main else "", world.device)
        self._main = threading.get_ident()
        self._step, self._phase, self._since = 0, "starting", time.monotonic()
        self._waits_for_data = False
        # Until the main thread says for the first time what it is about.
        self._starting = True
        self._opening = True
        self._count = 0
        self._left = self._own(0.0)
        # Of each worker its last count, and for how long it has been that, since this start or opening began; for the
        # watching thread alone.
        self._heard: dict[int, tuple[int, float]] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._pulse = Pulse.of_environment(self._attempt, world.local_rank, self._lost)

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(OSError):
            self._place.mkdir(exist_ok=True)
        self._since = time.monotonic()
        self._thread.start()
        if self._pulse is not None:
            self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Stop watching, at the first exit. Raises LostPeerError in place of what the loss of another has caused."""
        if self._over.is_set():
            return
        with self._lock:
            self._over.set()
            faulthandler.cancel_dump_traceback_later()
        if self._pulse is not None:
            self._pulse.stop()
        if error is None or self._world.size == 1 or not distributed.is_lost_peer(error):
            return
        with self._lock:
            # Who was frozen shows in time, and time has passed anyway; a lost connection is to be mended at once.
            signs = self._signs_twice() if re.search("timed out|timeout", str(error), re.IGNORECASE) else None
        raise LostPeerError(self._tell(error, signs)) from error

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        self._step = step
        self.note("training")

    def note(self, phase: str) -> None:
        """The main thread goes on, and this is what it is about."""
        self._phase, self._since, self._waits_for_data = phase, time.monotonic(), False
        self._starting = False

    def through(self, items: Iterator[_Item], waiting: str, working: str) -> Iterator[_Item]:
        """The same items; each is a sign of life. `waiting` is the phase before it comes, `working` the one after.

        All workers come by here as often as each other, and have their first item when one of them goes on.
        """
        with self.together(f"{waiting}, the first"):
            item = next(items, None)
        while item is not None:
            self.note(working)
            yield item
            self.note(waiting)
            self._waits_for_data = True
            item = next(items, None)
        self.note(working)

    @contextlib.contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run the block, then wait until all workers have run theirs: long work that is no step, and that all await.

        All workers come by here as often as each other.
        """
        self.note(phase)
        self._opening = True
        # Native code may begin before the thread that watches looks again.
        self._set_timer_unless_over()
        with distributed.however_long(self._world, f"the others, which are {phase}"):
            yield
        self.note(phase)
        self._opening = False
        self._set_timer_unless_over()

    def _limit_s(self) -> float:
        return max(self._timeout_s, _OPENING_S) if self._opening else self._timeout_s

    def _set_timer(self) -> None:
        """Native code that never gives Python's lock back stops the watching thread too, but not this timer."""
        faulthandler.dump_traceback_later(2 * self._limit_s(), exit=True, file=sys.stderr)

    def _set_timer_unless_over(self) -> None:
        with self._lock:
            if not self._over.is_set():
                self._set_timer()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._every_s):
            # In this order: the idle time of a start or an opening may not meet the limit of what comes after it.
            starting, opening = self._starting, self._opening
            limit_s = self._limit_s()
            now = time.monotonic()
            idle_s = now - self._since
            # Time in which this process stood still itself tells nothing of the others.
            passed_s, looked = min(now - looked, 2 * self._every_s), now
            with self._lock:
                if self._over.is_set():
                    return
                self._set_timer()
            is_left = self._leave_sign(idle_s)
            is_over = False
            if starting or opening:
                # No operation of all workers fails here by itself. On a disk that takes nothing nobody can give a sign.
                is_over = self._hears_nothing(passed_s if is_left else 0.0)
            else:
                self._heard.clear()
            if not starting:
                # A collective operation fails by itself; that error says more, unless nothing lets it come through.
                spare_s = 0.0 if self._waits_for_data or self._world.size == 1 else 2 * self._every_s
                is_over = is_over or idle_s > limit_s + spare_s
            if is_over:
                self._give_up(idle_s)
                return

    def _hears_nothing(self, passed_s: float) -> bool:
        """Whether another worker has left no sign for `timeout_s`; `passed_s`: the time since the last look."""
        counts = {sign.rank: sign.count for sign in self._signs()}
        for rank in set(range(self._world.size)) - {self._world.rank}:
            known, silent_s = self._heard.get(rank, (0, 0.0))
            count = counts.get(rank, known)
            self._heard[rank] = (count, silent_s + passed_s if count == known else 0.0)
        return any(silent_s > self._timeout_s for _, silent_s in self._heard.values())

    def _lost(self, what: str) -> None:
        """End this worker at once: others cannot be reached any more, by the word of `pulse`."""
        with self._lock:
            if not self._over.is_set():
                self._dump(what)
                self._end(
                    LostPeerError(f"worker {self._world.rank}, after step {self._step}: {what}\n{self._list([])}")
                )

    def _give_up(self, idle_s: float) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._dump(f"no progress for {idle_s:.0f} s")
            own = self._own(idle_s)
            waits_for_another = self._world.size > 1 and not self._waits_for_data
            error: LorotError
            if waits_for_another:
                error = LostPeerError(self._tell(None, self._signs_twice()))
            else:
                error = JobError(f"no progress within timeout_s={self._timeout_s:g}: {own}\n{self._list([])}")
            self._end(error)

    def _dump(self, why: str) -> None:
        """Write what each thread is doing to this worker's log, and give the report that follows its time."""
        # The timer of a small limit might fire in the middle of it.
        faulthandler.dump_traceback_later(_REPORT_S, exit=True, file=sys.stderr)
        _log.error("%s; what each thread was doing:", why)
        for handler in logging.getLogger().handlers:
            handler.flush()
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _end(self, error: LorotError) -> None:
        """End the process, whatever its main thread waits for."""
        self._folder.report_error(error)
        _log.error("this worker ends here: %s", error)
        logging.shutdown()
        os._exit(error.exit_code)

    def _tell(self, error: BaseException | None, signs: list[Sign] | None) -> str:
        """What this worker knows of the loss; `signs`: of the others that are still alive, None if nobody looked."""
        cause = f" ({str(error).strip().splitlines()[0][:200]})" if error is not None and str(error).strip() else ""
        alive = {sign.rank for sign in signs or ()} | {self._world.rank}
        silent = [str(rank) for rank in range(self._world.size) if rank not in alive]
        if signs is None:
            what = "the connection to another worker was lost"
        elif silent:
            what = f"worker {', '.join(silent)} stopped answering within timeout_s={self._timeout_s:g}"
        else:
            what = f"the workers waited for each other longer than timeout_s={self._timeout_s:g}"
        return f"worker {self._world.rank}, after step {self._step}: {what}{cause}\n{self._list(signs or [])}"

    def _list(self, signs: list[Sign]) -> str:
        seen = {sign.rank: sign for sign in [*self._signs(), *signs]}
        lines = [f"  {seen.get(rank, f'worker {rank}: never gave a sign')}" for rank in range(self._world.size)]
        return "\n".join([*lines, f"the stacks are in {self._folder.path}: log-rank*.txt; --resume goes on"])

    def _signs_twice(self) -> list[Sign]:
        """The signs of the workers that gave one between two looks, a little more than their interval apart."""
        before = {sign.rank: sign.count for sign in self._signs()}
        for _ in range(5):
            time.sleep(self._every_s / 2)
            # Another may look at the same time, for whom this one lives, where it was before it looked.
            self._leave(replace(self._left, idle_s=round(time.monotonic() - self._since, 1)))
        return [sign for sign in self._signs() if sign.count != before.get(sign.rank)]

    def _signs(self) -> list[Sign]:
        found = []
        for rank in range(self._world.size):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                told = json.loads((self._place / f"rank{rank}.json").read_text())
                if told.pop("attempt") == self._attempt:
                    found.append(Sign(**told))
        return found

    def _leave_sign(self, idle_s: float) -> bool:
        """Say that this worker lives, and where it is; whether that could be written."""
        return self._leave(self._own(idle_s))

    def _leave(self, sign: Sign) -> bool:
        self._count += 1
        self._left = replace(sign, count=self._count)
        path = self._place / f"rank{self._world.rank}.json"
        beside = path.with_suffix(".writing")
        try:
            beside.write_text(json.dumps({"attempt": self._attempt, **asdict(self._left)}))
            os.replace(beside, path)
        except OSError:
            return False
        return True

    def _own(self, idle_s: float) -> Sign:
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame)[-_SHOWN_FRAMES:] if frame is not None else []
        place = " < ".join(f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in reversed(stack))
        return Sign(self._world.rank, self._count, self._step, self._phase, round(idle_s, 1), place or "no code")
