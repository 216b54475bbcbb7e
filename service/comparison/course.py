"""What there is and what is missing, and measuring what is missing, one entry after the other."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from service.comparison import detecting, localizing
from service.comparison.entrants import Entrant, Field
from service.comparison.measurement import JOBS, Measurement, Missing, Place, Result, time_of
from service.errors import REQUEUE, ConfigError, JobError, LorotError, TrackingError, stop_code
from service.lineage import Earlier

_STOPS = (stop_code(signal.SIGINT), REQUEUE)
_HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Wish:
    """What is to be compared in.

    Attributes:
        jobs: of `JOBS`, in that order.
        seeds: of detectors' trainings; None: their configuration's.
        configs, data, root, overrides: by job.
        tracking_uri: where models and results are; None: the default.
        experiment: of MLflow, for new localizations.
    """

    jobs: tuple[str, ...] = JOBS
    seeds: tuple[int, ...] | None = None
    configs: Mapping[str, Path] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    root: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tracking_uri: str | None = None
    experiment: str = "lorot"


@dataclass(frozen=True)
class Entry:
    """One place in the table, and what is known of it before anything runs.

    Attributes:
        measurement: what fills it; None if it cannot be prepared, `problem` says why.
        earlier: what is in the registry already.
    """

    place: Place
    measurement: Measurement | None = None
    earlier: Earlier | None = None
    problem: Missing | None = None


@dataclass(frozen=True)
class Outcome:
    """What has come of it so far, in the order of the entries; `stopped` is the exit code of a signal, or 0."""

    results: Sequence[Result]
    missing: Sequence[Missing]
    stopped: int = 0

    @property
    def exit_code(self) -> int:
        """0 if nothing is missing; the signal's, or that of the first entry that failed."""
        return self.stopped or (self.missing[0].exit_code if self.missing else 0)


class StopError(KeyboardInterrupt):
    """A signal has asked to stop. No Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def prepare(known: Field, wish: Wish) -> tuple[Entry, ...]:
    """Every entry of the table, looked at: what is there, and what cannot be measured.

    Raises:
        ConfigError: a configuration is wrong, whatever the model.
        TrackingError: the tracking server does not answer.
    """
    entries = []
    for job in wish.jobs:
        for place, make in _places(job, known.entrants, wish):
            try:
                measurement = make()
            except (ConfigError, TrackingError):
                raise
            except LorotError as error:
                entries.append(Entry(place, problem=Missing(place, str(error), error.exit_code)))
                continue
            entries.append(Entry(measurement.place, measurement, measurement.find()))
    return tuple(entries)


def _places(job: str, entrants: Sequence[Entrant], wish: Wish) -> Iterator[tuple[Place, Callable[[], Measurement]]]:
    path, overrides = wish.configs.get(job), wish.overrides.get(job, ())
    data, root = wish.data.get(job), wish.root.get(job)
    if job == "wsol":
        known = localizing.settings(path, data, root, overrides)
        for protocol in known.protocols:
            for entrant in entrants:
                yield (
                    Place(job, entrant, protocol),
                    lambda entrant=entrant, protocol=protocol: localizing.prepare(  # type: ignore[misc]
                        entrant, protocol, known, wish.tracking_uri, wish.experiment
                    ),
                )
        return
    given = detecting.Settings(path, data, root, overrides)
    for seed in wish.seeds if wish.seeds is not None else (None,):
        for entrant in entrants:
            yield (
                Place(job, entrant, "of the configuration" if seed is None else str(seed)),
                lambda entrant=entrant, seed=seed: detecting.prepare(  # type: ignore[misc]
                    job, entrant, seed, given, wish.tracking_uri
                ),
            )


def run(entries: Sequence[Entry], say: Callable[[str], object], save: Callable[[Outcome], object]) -> Outcome:
    """Measure what is not there. A failure is noted, and the others go on; a signal ends it all.

    Args:
        say: is told what is being done.
        save: is given what there is after every entry that was measured.

    Returns:
        All entries, in their order, whether they were there or not.
    """
    known: list[Result | Missing | None] = [_known(entry) for entry in entries]
    for entry in entries:
        if entry.problem is not None:
            say(f"cannot be measured: {entry.place.title}: {entry.problem.reason}")
    waiting = [number for number, one in enumerate(known) if one is None]
    clock = _Clock([entries[number] for number in waiting])
    stopped = 0
    for turn, number in enumerate(waiting):
        entry = entries[number]
        if stopped:
            known[number] = Missing(entry.place, "not measured: stopped before", stopped)
            continue
        left = clock.left(turn)
        work = entry.measurement.work if entry.measurement is not None else ""
        say(f"[{turn + 1} of {len(waiting)}] {entry.place.title}: {work}" + (f"; {left}" if left else ""))
        began = time.monotonic()
        found, stopped = _attempt(entry, say)
        known[number] = found
        if isinstance(found, Result):
            clock.took(entry, time.monotonic() - began)
        else:
            say(f"failed: {entry.place.title}: {found.reason}")
        save(_outcome(entries, known, stopped))
    return _outcome(entries, known, stopped)


def _attempt(entry: Entry, say: Callable[[str], object]) -> tuple[Result | Missing, int]:
    """What came of measuring an entry; and the exit code of the signal that ended it, or 0."""
    measurement = entry.measurement
    assert measurement is not None, "what has neither a problem nor a result can be measured"
    try:
        with _stoppable():
            run_id, metrics = measurement.run(say)
    except KeyboardInterrupt as stop:
        received = stop.number if isinstance(stop, StopError) else signal.SIGINT
        code = stop_code(received)
        return Missing(entry.place, f"stopped by {signal.Signals(received).name}", code), code
    except Exception as error:
        if os.environ.get("LOROT_DEBUG"):
            traceback.print_exc()
        if not isinstance(error, LorotError):
            return Missing(entry.place, f"unexpected {type(error).__name__}: {error}", 1), 0
        stopped = isinstance(error, JobError) and error.exit_code in _STOPS
        return Missing(entry.place, str(error), error.exit_code), error.exit_code if stopped else 0
    images, unlike = measurement.images, measurement.unlike_published
    return Result(entry.place, run_id, metrics, images, unlike, False, datetime.now(UTC)), 0


def collect(entries: Sequence[Entry]) -> Outcome:
    """What is there already; the rest is missing for want of a run."""
    return _outcome(entries, [_known(entry) for entry in entries])


def _known(entry: Entry) -> Result | Missing | None:
    """What is known of an entry before anything runs; None if it is to be measured."""
    if entry.measurement is None or entry.earlier is None:
        return entry.problem
    images, unlike = entry.measurement.images, entry.measurement.unlike_published
    earlier = entry.earlier
    return Result(entry.place, earlier.run_id, earlier.metrics, images, unlike, True, time_of(earlier.ended_ms))


def _outcome(entries: Sequence[Entry], known: Sequence[Result | Missing | None], stopped: int = 0) -> Outcome:
    results = [one for one in known if isinstance(one, Result)]
    missing = [
        one if isinstance(one, Missing) else Missing(entry.place, "not measured yet", 1)
        for entry, one in zip(entries, known, strict=True)
        if not isinstance(one, Result)
    ]
    return Outcome(results, missing, stopped)


class _Clock:
    """How long what is left will take, by what the like took: in this run, else before it."""

    def __init__(self, waiting: Sequence[Entry]) -> None:
        self._waiting = waiting
        self._expected: list[float | None] = []
        self._took: dict[str, list[float]] = {}
        for entry in waiting:
            assert entry.measurement is not None, "only such are waited for"
            self._expected.append(entry.measurement.expected_s())

    def took(self, entry: Entry, seconds: float) -> None:
        self._took.setdefault(entry.place.job, []).append(seconds)

    def left(self, number: int) -> str:
        """For the entries from `number` on; empty as long as one is unknown."""
        total = 0.0
        for entry, expected in zip(self._waiting[number:], self._expected[number:], strict=True):
            own = self._took.get(entry.place.job)
            seconds = sum(own) / len(own) if own else expected
            if seconds is None:
                return ""
            total += seconds
        return f"about {minutes(total)} left"


def minutes(seconds: float) -> str:
    """40 -> "1 min"; 4000 -> "1 h 7 min"."""
    whole = max(1, round(seconds / 60))
    return f"{whole} min" if whole < 60 else f"{whole // 60} h {whole % 60} min"


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A signal that asks this process to stop raises StopError within; a job's own launcher heeds it by itself."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StopError(number)

    heeded = [n for n in _HEEDED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
