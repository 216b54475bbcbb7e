"""An end to how workers meet: torch waits for ever at an address that listens and never answers."""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable

from service.errors import LostPeerError

_log = logging.getLogger(__name__)

_LAP_S = 0.2


def within(limit_s: float, meet: Callable[[], object], what: str) -> None:
    """Run `meet` in a thread of its own, which may block in native code.

    Time in which this whole process stood still does not count.

    Args:
        what: has failed if it does not end, for the error.

    Raises:
        LostPeerError: it has not ended after `limit_s`; what each thread was doing is in the log.
        Exception: what `meet` has raised.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            meet()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="meeting", daemon=True)
    thread.start()
    waited_s, looked = 0.0, time.monotonic()
    while thread.is_alive():
        # Not for all of the time: a signal is heard between two laps.
        thread.join(_LAP_S)
        now = time.monotonic()
        waited_s, looked = waited_s + min(now - looked, 10 * _LAP_S), now
        if waited_s > limit_s and thread.is_alive():
            _log.error("%s; what each thread was doing:", what)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            raise LostPeerError(f"{what}: no answer for {waited_s:.0f} s")
    if failures:
        raise failures[0]
