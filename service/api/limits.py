"""How often a client may ask: a token bucket for each."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

# Clients that are remembered. The one that was quiet for longest is forgotten first; its bucket was full again anyhow.
_CLIENTS_MOST = 10_000


class Buckets:
    """A bucket for each client, which holds a minute's worth and fills evenly. Thread-safe."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._lock = threading.Lock()
        # By client: what is left, and when that was.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take one; returns 0, or the seconds until there is one again."""
        with self._lock:
            left = self._filled(client)
            wait = 0.0 if left >= 1 else (1 - left) / self._per_s
            self._left[client] = (left if wait else left - 1, self._clock())
            self._left.move_to_end(client)
            if len(self._left) > _CLIENTS_MOST:
                self._left.popitem(last=False)
            return wait

    def _filled(self, client: str) -> float:
        left, when = self._left.get(client, (self._most, self._clock()))
        return min(self._most, left + (self._clock() - when) * self._per_s)
