"""The signals that ask a worker to stop: heard from its first moment on, obeyed where nothing is lost.

Imports neither torch nor the service's heavier parts, so that it listens before those are loaded.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from service.errors import stop_code

# Ctrl-C; what schedulers send before they take a machine away; what Slurm sends instead; a terminal that was closed.
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOK_S = 0.5
_log = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal has come before there was anything to save. Like KeyboardInterrupt no error, lest libraries handle it.

    Attributes:
        number: of the signal.
        exit_code: what the worker ends with.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before the first step; --resume begins there")
        self.number = number
        self.exit_code = stop_code(number)


class Signals:
    """Hears SIGINT, SIGTERM, SIGUSR1 and SIGHUP, and that whoever started this worker is gone.

    Until `defer` the first of them ends the worker by raising Stopped in its main thread. From then on it is only
    noted, for the loop to ask about; however many follow change nothing. If the worker has not ended by itself when its
    time is over, in native code or wherever, a thread ends it.

    torchrun would start the worker of a dead launcher again and again; the first worker of a machine tells it to end.

    Args:
        grace_s: seconds from the first signal to that end.
    """

    def __init__(self, grace_s: float = 21.0) -> None:
        self._grace_s = grace_s
        self._number = 0
        self._defers = False
        self._last_words: Callable[[str, int], object] = _say
        # By torchrun; in a terminal the parent is a shell, which may leave.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        # Older launchers say 1 here, which is a process that never goes.
        self._launcher = int(os.environ.get("LOROT_LAUNCHED") or 0)
        # One of them: torchrun leaves its workers behind at the third signal.
        self._tells = self._parent > 1 and os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def number(self) -> int:
        """The first signal, or 0 while there was none. SIGTERM also stands for a launcher or torchrun that died."""
        if self._number == 0 and self._is_orphan():
            _log.warning("what started this worker is gone; stopping after this step")
            self._number = signal.SIGTERM
        return self._number

    def listen(self) -> None:
        """Hear from now on. Call it in the main thread, once."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Native code may keep the main thread from Python's handler for ever; this is written at once.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in HEARD:
            # nohup has it ignored, and that is to last.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def defer(self) -> None:
        """From now on signals are noted only; raises Stopped if one has come already."""
        self._defers = True
        if self._number:
            raise Stopped(self._number)

    def limit(self, grace_s: float, last_words: Callable[[str, int], object]) -> None:
        """Set the time that is left after a signal, and who is told when it runs out: why, and the exit code.

        `last_words` runs in another thread, and the process ends after it.
        """
        self._grace_s, self._last_words = grace_s, last_words

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        # Nothing else here: it interrupts the main thread anywhere, in the middle of logging too.
        if self._number == 0:
            self._number = number
            if not self._defers:
                raise Stopped(number)

    def _watch(self, descriptor: int) -> None:
        first, began = 0, 0.0
        while True:
            left = began + self._grace_s - time.monotonic() if first else None
            if left is not None and left <= 0:
                self._end(first)
            if self._tells and self._launcher_is_gone():
                self._tells = False
                if os.getppid() == self._parent:
                    _log.warning("the launcher is gone; telling torchrun to end")
                    os.kill(self._parent, signal.SIGTERM)
            wait_s = _LOOK_S if self._tells and self._launcher > 1 else None
            select.select([descriptor], [], [], wait_s if left is None else min(left, _LOOK_S))
            with contextlib.suppress(BlockingIOError):
                for number in os.read(descriptor, 64):
                    if number in HEARD and not first:
                        first, began = number, time.monotonic()
                        _log.info("signal %d: stopping after this step, within %.0f s", number, self._grace_s)

    def _end(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        code = stop_code(number)
        try:
            self._last_words(
                f"{self._grace_s:.0f} s after {name} the step, or the saving after it, had not ended", code
            )
        finally:
            os._exit(code)

    def _is_orphan(self) -> bool:
        return (self._parent > 0 and os.getppid() != self._parent) or self._launcher_is_gone()

    def _launcher_is_gone(self) -> bool:
        if self._launcher <= 1:
            return False
        try:
            os.kill(self._launcher, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _say(why: str, _code: int) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
