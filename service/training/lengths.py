"""How long a job trains, and how often it stops to record, evaluate and save: in optimizer steps. Imports no torch."""

from dataclasses import dataclass

from service.config import JobConfig


@dataclass(frozen=True)
class Lengths:
    """The job's durations in optimizer steps; `save` is 0 for never."""

    samples: int
    total: int
    record: int
    evaluate: int
    save: int

    @classmethod
    def of(cls, config: JobConfig, available: int) -> "Lengths":
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
