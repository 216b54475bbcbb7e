"""The machines of a job tell each other that they live: one that loses its power or its network says no last word.

TCP notices a peer that vanished only when it times out, and then so do collective operations, after `timeout_s`. So one
worker of each machine counts up a number in the store that the machines meet at (`lorot rendezvous`), which outlives
them all, and looks whether the others' numbers grow. No clocks are compared, and no shared disk is needed. Time in
which this machine stood still itself tells nothing of the others, and does not count.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from service.errors import ConfigError

# How torchrun's environment says where the machines meet; `service.jobs.torchrun` sets it.
VARIABLE = "LOROT_RENDEZVOUS"
# torchrun itself takes a machine for lost after 4 s; this has to outlast a moment in which a worker is busy.
SILENCE_S = 10.0
_EVERY_S = 1.0
# The last word may have to wait for a busy machine, and for a new connection.
_LAST_WORD_S = 5.0
# torchrun's own, for a place without one.
_PORT = 29400
_OVER = "over"


class Pulse:
    """This machine's sign of life, and a look at those of the others, on a thread of its own.

    Args:
        where: "HOST:PORT" or "[ADDRESS]:PORT" of the store.
        attempt: a name that all machines agree on, and no earlier attempt had.
        machine: this one's number, 0 to `count` - 1.
        lost: is told once, in a sentence, when a machine or the store has been silent for `silence_s`.

    Raises:
        ConfigError: `where` is no place.
    """

    def __init__(
        self,
        where: str,
        attempt: str,
        machine: int,
        count: int,
        lost: Callable[[str], object],
        silence_s: float = SILENCE_S,
    ) -> None:
        place = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d+))?", where)
        if place is None:
            raise ConfigError(f"{VARIABLE}={where}: write HOST:PORT, or [ADDRESS]:PORT for an IPv6 address")
        self._host, self._port = place[1] or place[2], int(place[3] or _PORT)
        self._where, self._machine, self._lost, self._silence_s = where, machine, lost, silence_s
        self._keys = [f"lorot/pulse/{attempt}/{number}" for number in range(count)]
        self._over = threading.Event()
        self._silent: list[int] = []
        self._counted = (0.0, time.monotonic())
        self._answered = 0.0
        self._asking = threading.Thread(target=self._ask, name="pulse", daemon=True)
        self._judging = threading.Thread(target=self._judge, name="pulse-judge", daemon=True)

    @classmethod
    def of_environment(cls, attempt: str, local_rank: int, lost: Callable[[str], object]) -> "Pulse | None":
        """As torchrun and its launcher say; None where there is one machine, or another worker does it for this one."""
        where, count = os.environ.get(VARIABLE, ""), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if not where or count == 1 or local_rank != 0:
            return None
        return cls(where, attempt, int(os.environ["GROUP_RANK"]), count, lost)

    def start(self) -> None:
        """Begin. Of a machine that never says anything here it is the watchdog that tells."""
        self._counted = (0.0, time.monotonic())
        self._asking.start()
        self._judging.start()

    def stop(self) -> None:
        """Say that this machine's silence means nothing from now on."""
        self._over.set()
        # It may be waiting for a store that does not answer; nobody waits for it.
        self._asking.join(_LAST_WORD_S)

    def _awake_s(self) -> float:
        """The time that has passed, without the time in which this whole process stood still.

        The judging thread counts it: it waits for nothing but the clock, so a lap that is too long was slept through.
        """
        counted_s, at = self._counted
        return counted_s + min(time.monotonic() - at, 2 * _EVERY_S)

    def _judge(self) -> None:
        """By the clock alone: the store's own time limit is no limit where the way to it is cut."""
        while not self._over.wait(_EVERY_S):
            self._counted = (self._awake_s(), time.monotonic())
            if self._silent:
                machines = ", ".join(map(str, self._silent))
                self._tell(f"machine {machines} of the job has given no sign of life for {self._silence_s:g} s")
                return
            if self._awake_s() - self._answered > self._silence_s:
                self._tell(f"the rendezvous at {self._where} has not answered for {self._silence_s:g} s")
                return

    def _ask(self) -> None:
        store = None
        told: dict[int, tuple[bytes, float]] = {}
        number = 0
        while not self._over.is_set():
            try:
                store = store or self._connect(self._silence_s / 2)
                number += 1
                store.set(self._keys[self._machine], str(number))
                self._silent = self._look(store, told)
                self._answered = self._awake_s()
            except (DistError, RuntimeError, OSError):
                # Connections do not mend themselves.
                store = None
            self._over.wait(_EVERY_S)
        with contextlib.suppress(DistError, RuntimeError, OSError):
            # Others may watch for a while yet, and would take a machine that is done for one that is dead.
            store = store or self._connect(_LAST_WORD_S)
            store.set(self._keys[self._machine], _OVER)

    def _connect(self, limit_s: float) -> TCPStore:
        limit = timedelta(seconds=limit_s)
        return TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=limit)

    def _look(self, store: TCPStore, told: dict[int, tuple[bytes, float]]) -> list[int]:
        """The machines that have been silent for too long. `told`: what each said last, and when that was new."""
        # Asking for what is not there yet would wait for it.
        begun = [number for number, key in enumerate(self._keys) if number in told or store.check([key])]
        now = self._awake_s()
        for number, value in zip(begun, store.multi_get([self._keys[n] for n in begun]), strict=True):
            if told.get(number, (b"", 0.0))[0] != value:
                told[number] = value, now
        return [n for n in begun if told[n][0] != _OVER.encode() and now - told[n][1] > self._silence_s]

    def _tell(self, what: str) -> None:
        if not self._over.is_set():
            self._lost(what)
