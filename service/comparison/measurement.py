"""One result that a table needs: found in the registry, or measured. Each kind of job has a module of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from service.comparison.entrants import Entrant
from service.lineage import Earlier

JOBS = ("wsol", "detect", "segment")
TITLES = {"wsol": "localization", "detect": "detection", "segment": "segmentation"}


@dataclass(frozen=True)
class Images:
    """What a result was measured on.

    Attributes:
        name, split, digest: of the data; of a job that learns from a split and is measured on another, of both.
        count: images it is measured on.
    """

    name: str
    split: str
    digest: str
    count: int


@dataclass(frozen=True)
class Place:
    """Which entry of the table a result is.

    Attributes:
        job: one of `JOBS`.
        entrant: the model.
        variant: how it is asked: a localization's protocol, or the seed of a detector's training.
    """

    job: str
    entrant: Entrant
    variant: str

    @property
    def title(self) -> str:
        """For people."""
        how = f"protocol {self.variant}" if self.job == "wsol" else f"seed {self.variant}"
        return f"{TITLES[self.job]} with {self.entrant.title}, {how}"


class Measurement(Protocol):
    """A result that can be looked for, or made."""

    @property
    def place(self) -> Place: ...

    @property
    def images(self) -> Images: ...

    @property
    def unlike_published(self) -> tuple[str, ...]:
        """Why no printed number may stand beside it; empty if one may."""
        ...

    @property
    def work(self) -> str:
        """How much there is to do, for people."""
        ...

    def find(self) -> Earlier | None:
        """The newest result of the same weights, data and settings in the registry; raises TrackingError."""
        ...

    def expected_s(self) -> float | None:
        """How long it will take, by what the like took before; None if nothing like it is recorded."""
        ...

    def run(self, say: Callable[[str], object]) -> tuple[str, Mapping[str, float]]:
        """Measure and record it: the id of its run, and its metrics, by the names of `Earlier`; raises LorotError."""
        ...


@dataclass(frozen=True)
class Result:
    """A measured entry.

    Attributes:
        run_id: its run.
        metrics: fractions, by name.
        images: what it was measured on.
        unlike_published: as of its `Measurement`.
        is_reused: it was there before.
        ended: when it was measured, UTC; None if unknown.
    """

    place: Place
    run_id: str
    metrics: Mapping[str, float]
    images: Images
    unlike_published: tuple[str, ...]
    is_reused: bool
    ended: datetime | None


@dataclass(frozen=True)
class Missing:
    """An entry that could not be measured: why, and the exit code that goes with it."""

    place: Place
    reason: str
    exit_code: int


def time_of(milliseconds: int | None) -> datetime | None:
    """Milliseconds since the epoch as a time."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
