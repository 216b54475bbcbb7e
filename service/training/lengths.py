"""How long a job trains, and how often it stops to record, evaluate and save: in optimizer steps. Imports no torch."""

from dataclasses import dataclass

from service.config import JobConfig, TrainingConfig
from service.errors import ConfigError


@dataclass(frozen=True)
class Lengths:
    """The job's durations in optimizer steps; `save` is 0 for never."""

    samples: int
    total: int
    record: int
    evaluate: int
    save: int

    @classmethod
    def of(cls, config: TrainingConfig, available: int) -> "Lengths":
        """For a training set of `available` samples, of which `data.train_limit` may keep fewer."""
        samples = min(available, config.data.train_limit or available)
        sizes = {"samples_per_epoch": samples, "global_batch": config.global_batch}
        total = config.duration.steps(**sizes)
        sizes["total_steps"] = total
        save = config.checkpoint.every
        return cls(
            samples,
            total,
            config.tracking.log_every.steps(**sizes),
            config.evaluate_every.steps(**sizes),
            save.steps(**sizes) if save is not None else 0,
        )


def sizes(config: JobConfig, samples: int) -> tuple[tuple[int, int], ...]:
    """(from which step, side of the input) for a training set of which `samples` are used; empty without `data.sizes`.

    Raises:
        ConfigError: a part ends before the one that precedes it.
    """
    if not config.data.sizes:
        return ()
    lengths = {"samples_per_epoch": samples, "global_batch": config.global_batch}
    lengths["total_steps"] = config.duration.steps(**lengths)
    ends = [part.until.steps(**lengths) for part in config.data.sizes]
    for part, before, end, earlier in zip(config.data.sizes[1:], config.data.sizes, ends[1:], ends, strict=False):
        if end < earlier:
            raise ConfigError(
                f"data.sizes: size {part.size} until {part.until} (step {end}) ends before size {before.size} until "
                f"{before.until} (step {earlier}); write them in the order in which they are used"
            )
    starts = dict(zip([0, *ends], [*(part.size for part in config.data.sizes), config.data.size], strict=True))
    return tuple(starts.items())
