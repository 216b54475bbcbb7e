"""Means and how far they can be trusted: over independent runs, and over pairs of runs with the same seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Of `count` independent values: their mean, and the sample standard deviation; None of a single one."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """Differences (ours minus the reference's) of runs that have their seed in common.

    Attributes:
        mean, deviation: of the differences; the sample standard deviation, None of a single pair.
        low, high: Student's 95 % confidence interval of the mean; None of a single pair.
        seeds: of the pairs, ascending.
        num_above: pairs in which the difference is above 0.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    num_above: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation (divisor n - 1); None without a finite value. Others are an error.

    Raises:
        ValueError: a value is not finite.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{list(values)}: a spread is of finite values")
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def paired(ours: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """The comparison of two methods seed by seed (both: value by seed); None without a seed in common."""
    seeds = tuple(sorted(ours.keys() & reference.keys()))
    found = spread([ours[seed] - reference[seed] for seed in seeds])
    if found is None:
        return None
    low = high = None
    if found.deviation is not None:
        # Takes a tenth of a second to import.
        from scipy import special

        reach = float(special.stdtrit(found.count - 1, (1 + _CONFIDENCE) / 2))
        reach *= found.deviation / math.sqrt(found.count)
        low, high = found.mean - reach, found.mean + reach
    above = sum(ours[seed] > reference[seed] for seed in seeds)
    return Paired(found.mean, found.deviation, low, high, seeds, above)
