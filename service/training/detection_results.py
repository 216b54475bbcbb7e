"""What a detector's job leaves behind: the detector, what it was measured at, and the record of it at its backbone."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipelines.manifest import Manifest
from service import detector_bundle, lineage, provenance, report
from service.config import DetectionConfig
from service.detector_bundle import DetectorCard
from service.downstream.coco_scores import METRICS
from service.run_folder import RunFolder
from service.tracking import Run
from service.training.backbone import Backbone
from service.training.console import Display

DETECTOR = "detector"
# What becomes tags of the backbone's version.
HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# A large model over a slow line. A server that does not answer at all is not waited for so long.
_SENDING_S = 300.0


def finish(
    job: DetectionConfig,
    folder: RunFolder,
    run: Run,
    stands_on: Backbone,
    splits: tuple[Manifest, Manifest],
    weights: Mapping[str, Tensor],
    metrics: Mapping[str, float],
    done: Mapping[str, Any],
    display: Display,
) -> None:
    """Write the detector and `JOB.json`, and let the backbone's version list what was measured; on the main worker.

    All of it is on the disk before the tracking server is needed.

    Args:
        splits: that it learnt, and that it was measured on.
        metrics: of the last evaluation, named val/AP and so on; what the clock said of it is no score.

    Raises:
        StorageError: something could not be written.
    """
    resolved, train_set, eval_set = stands_on.resolved, *splits
    own = {key: metrics[f"val/{key}"] for key in METRICS if f"val/{key}" in metrics}
    known = stands_on.card.view
    card = DetectorCard(
        job=job.job,
        name=job.model.name,
        trunk=dict(stands_on.card.model),
        classes=tuple(train_set.classes),
        short_side=job.data.short_sides[-1],
        long_side=job.data.long_side,
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        options=dict(job.model.options),
        class_ids=tuple(train_set.class_ids),
        backbone={
            "uri": resolved.uri,
            "weights_sha256": stands_on.card.weights_sha256,
            "run_id": resolved.run_id or "",
        },
        data=job.data.name,
        data_digest=train_set.digest,
        eval_digest=eval_set.digest,
        metrics=own,
        run_id=run.run_id,
        run_name=os.environ.get("LOROT_JOB_NAME") or job.name,
        versions=provenance.package_versions() | provenance.code_version(),
    )
    card = detector_bundle.write(folder.path / DETECTOR, weights, card)
    result = {
        "job": job.job,
        "model": resolved.name or resolved.uri,
        "version": resolved.version,
        "model_uri": resolved.uri,
        "run_id": resolved.run_id,
        "model_weights_sha256": stands_on.card.weights_sha256,
        "detector": job.model.name,
        "detector_sha256": card.weights_sha256,
        "data": eval_set.name,
        "split": eval_set.split,
        "digest": eval_set.digest,
        "config_digest": job.digest,
        "seed": job.seed,
        "scores": card.metrics,
        "record_id": run.run_id,
    }
    run.log_artifact(folder.write(f"{job.job}.json", result))
    summary = {"name": job.name, "model_name": None, "model_version": None, **done, job.job: result}
    folder.write(folder.summary.name, summary)
    # A metric keeps one value a step, and this run may have been finished before (`--eval-only`).
    run.log_metrics({f"{job.job}/{key}": value for key, value in own.items()}, step=run.resumed)
    data_digest = lineage.split_digest(train_set.digest, eval_set.digest)
    about: dict[str, Any] = {"data_digest": data_digest, "config_digest": job.digest, "seed": job.seed}
    lineage.tag_version(run, resolved, job.job, own, HEADLINE, **about)
    run.log_artifact(folder.path / DETECTOR, DETECTOR)
    run.log_artifact(folder.summary)
    run.log_artifact(report.write(folder.path, folder.path / "report.html"))
    said = f"the detector lies in {folder.path / DETECTOR}"
    if not run.settle(_SENDING_S):
        said += f", and is not recorded yet; `lorot sync {folder.path}` does it later"
    elif resolved.version is not None:
        said += f"; recorded at {resolved.uri}"
    display.say(said)
