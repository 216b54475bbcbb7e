"""The share of a training's time that its steps waited for batches: when it is worth a word, and which one."""

import statistics
from collections.abc import Mapping, Sequence

METRIC = "train/data_wait_share"
# Above this share of the time somebody should look at it.
NOTABLE = 0.05


def median(history: Sequence[Mapping[str, float]]) -> float | None:
    """The middle of a run's records, 0 to 1; None if it has none of them."""
    shares = [record[METRIC] for record in history if METRIC in record]
    return statistics.median(shares) if shares else None


def explain(share: float | None) -> str:
    """What a share means and who can tell more; nothing up to 5 %."""
    if share is None or share <= NOTABLE:
        return ""
    return (
        f"{share:.1%} of the training time was spent waiting for data: without it, training would be up to "
        f"{1 / (1 - min(share, 0.99)):.2f} times as fast. `lorot profile CONFIG` measures the loader and the step "
        "apart, and says what to change"
    )
