"""What a job leaves behind at its end: the model, its registration, the summary and the report."""

from collections.abc import Mapping
from typing import Any

import torch

from service import bundle, report, tracking
from service.bundle import Card
from service.config import JobConfig
from service.run_folder import RunFolder
from service.training.console import Display

# A large model over a slow line. A server that does not answer at all is not waited for so long.
_REGISTRATION_S = 300.0


def finish(
    job: JobConfig,
    folder: RunFolder,
    run: tracking.Run,
    card: Card,
    weights: Mapping[str, torch.Tensor],
    confusion: Any,
    done: Mapping[str, Any],
    display: Display,
) -> None:
    """Write the model, have it registered, and leave the summary; on the main worker.

    All of it is on the disk before the tracking server is needed, and the registration waits in the spool like every
    other record: a server that is away costs the training nothing.

    Raises:
        StorageError: something could not be written.
    """
    bundle.write_bundle(folder.model, weights, card)
    summary: dict[str, Any] = {"name": job.name, "model_name": job.model_name or None, "model_version": None, **done}
    folder.write(folder.summary.name, summary)
    if confusion is not None:
        folder.write(folder.confusion.name, {"classes": list(card.classes), "matrix": confusion.tolist()})
        run.log_artifact(folder.confusion)
    if job.model_name:
        run.register_model(folder.model, job.model_name, job.registry.metric, job.registry.mode)
        display.say(_registration(job, folder, run))
    # Read when it is sent, so with the version in it.
    run.log_artifact(folder.summary)
    run.log_artifact(report.write(folder.path, folder.path / "report.html"))


def _registration(job: JobConfig, folder: RunFolder, run: tracking.Run) -> str:
    """Wait for the registration, and say what became of it."""
    if not run.settle(_REGISTRATION_S):
        return (
            f"the model lies in {folder.model} and is not registered yet: the tracking server did not take it; "
            f"`lorot sync {folder.path}` does it later"
        )
    version = folder.read(folder.summary.name).get("model_version")
    if version is None:
        return f"the model lies in {folder.model}; the registry refused it, {folder.log(0)} says why"
    return f"registered as models:/{job.model_name}/{version}"
