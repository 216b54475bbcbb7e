"""One machine's queue: which of the waiting jobs start now. Pure functions. Imports no torch.

The order. A job's place is `submitted - 600 s x priority`, the earliest first: one point of priority is worth ten
minutes of waiting. Within a priority that is first come, first served. Since the places of jobs that are still to come
grow with the clock, only finitely many can ever be put before a job: no priority starves for ever.

The rule. Jobs start in this order as long as they fit. The first that does not fit is the head: it has the next turn.
Behind it a job may start only if the head would fit beside it and beside all that runs from behind the head. So what
overtakes the head never delays it: it starts at the latest when those before it have ended, whatever comes after.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.amounts import shown_bytes

# Seconds of waiting that one point of priority is worth.
WORTH_S = 600.0
# Cores are counted in fractions.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Amount:
    """Of what a machine has and a job takes.

    Attributes:
        memory: bytes; a job that names none takes none.
    """

    gpus: int = 0
    cpus: float = 0.0
    memory: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.gpus + other.gpus, self.cpus + other.cpus, self.memory + other.memory)

    def __str__(self) -> str:
        memory = f" and {shown_bytes(self.memory)} of memory" if self.memory else ""
        return f"{self.gpus} GPUs{',' if memory else ' and'} {self.cpus:g} cores{memory}"

    def fits(self, capacity: "Amount") -> bool:
        """Whether it is no more than `capacity`."""
        return self.fits_beside(Amount(), capacity)

    def fits_beside(self, used: "Amount", capacity: "Amount") -> bool:
        """Whether there is room for it beside `used`, of what it takes; the rest may have been given away twice."""
        both = used + self
        return (
            (not self.gpus or both.gpus <= capacity.gpus)
            and (not self.cpus or both.cpus <= capacity.cpus + _ROUNDING)
            and (not self.memory or both.memory <= capacity.memory)
        )


@dataclass(frozen=True)
class Entry:
    """A job that waits or runs.

    Attributes:
        id: decides between two of the same place.
        priority: the higher, the earlier.
        since_s: when it came, seconds since the epoch.
        needs: of all its nodes together.
    """

    id: str
    priority: int
    since_s: float
    needs: Amount

    @property
    def place(self) -> tuple[float, str]:
        return self.since_s - WORTH_S * self.priority, self.id


def total(entries: Iterable[Entry]) -> Amount:
    """What they take together."""
    return sum((entry.needs for entry in entries), Amount())


def in_order(waiting: Iterable[Entry]) -> list[Entry]:
    """The next first."""
    return sorted(waiting, key=lambda entry: entry.place)


def next_ones(waiting: Iterable[Entry], running: Sequence[Entry], capacity: Amount) -> list[Entry]:
    """Those that start now, in the order of their turns.

    Those that would not fit an idle machine either are in nobody's way.

    Args:
        running: all that takes from the capacity now.
    """
    chosen: list[Entry] = []
    head: Entry | None = None
    used = total(running)
    # What runs from behind the head, with the head itself.
    reserved = Amount()
    for entry in in_order(waiting):
        if not entry.needs.fits(capacity):
            # There was more of the machine once: it would be the head for ever.
            continue
        if not entry.needs.fits_beside(used, capacity):
            if head is None:
                head = entry
                reserved = head.needs + total(other for other in running if other.place > head.place)
            continue
        if head is not None:
            if not entry.needs.fits_beside(reserved, capacity):
                continue
            reserved += entry.needs
        used += entry.needs
        chosen.append(entry)
    return chosen
