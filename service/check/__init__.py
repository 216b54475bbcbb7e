"""What a configuration amounts to, before anything is started: `lorot check`."""

from typing import overload

from service.check import classifier, detector, findings
from service.check.classifier import activation_bytes, estimate_memory, network, num_pretext_labels
from service.check.findings import Findings, Outline, Plan, Split, plan, sparkline
from service.check.presentation import show
from service.config import DetectionConfig, JobConfig, TrainingConfig


@overload
def examine(job: JobConfig, workers: int | None = None) -> Findings[JobConfig]: ...


@overload
def examine(job: TrainingConfig, workers: int | None = None) -> Findings[TrainingConfig]: ...


def examine(job: TrainingConfig, workers: int | None = None) -> Findings[TrainingConfig]:
    """Work out what `job` would do on `workers` processes of this machine; raises ConfigError as training would."""
    if isinstance(job, DetectionConfig):
        return detector.examine(job, workers)
    assert isinstance(job, JobConfig), "these are all kinds there are"
    return classifier.examine(job, workers)


def outline(job: TrainingConfig, workers: int | None = None) -> Outline[TrainingConfig]:
    """The part of `examine` that needs no network, where there is no torch; raises ConfigError as that does."""
    if isinstance(job, DetectionConfig):
        return detector.outlined(job, workers)[0]
    return findings.outline(job, workers)


__all__ = [
    "Findings",
    "Outline",
    "Plan",
    "Split",
    "activation_bytes",
    "estimate_memory",
    "examine",
    "network",
    "num_pretext_labels",
    "outline",
    "plan",
    "show",
    "sparkline",
]
