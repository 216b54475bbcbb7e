"""The card of a trained model: what it is, and all that made it."""

import os
from collections.abc import Mapping

from pipelines.manifest import Manifest
from pipelines.plan import View
from service import bundle, provenance
from service.bundle import Card
from service.config import JobConfig


def card_of(
    job: JobConfig, train_set: Manifest, view: View, num_pretext: int, metrics: Mapping[str, float], run_id: str
) -> Card:
    """What is registered beside the weights."""
    return Card(
        model=job.model.model_dump(mode="json"),
        classes=tuple(train_set.classes),
        view=bundle.evaluation_view(view),
        training_view={
            "size": view.size,
            "sizes": [part.model_dump(mode="json") for part in job.data.sizes],
            "augment": [part.model_dump(mode="json") for part in job.data.augment],
            "repeats": job.data.repeats,
        },
        data=job.data.name,
        data_digest=train_set.digest,
        data_options=dict(job.data.options),
        root=str(job.data.root),
        split=job.data.eval_split,
        pretext=job.pretext.name,
        pretext_options=dict(job.pretext.options),
        num_pretext=num_pretext,
        objective=job.objective.name,
        metrics=dict(metrics),
        chosen_by=job.registry.metric,
        run_id=run_id,
        run_name=os.environ.get("LOROT_JOB_NAME") or job.name,
        versions=provenance.package_versions() | provenance.code_version(),
    )
