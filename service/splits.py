"""A job's two splits, opened once per machine: whoever comes first looks at the files, the others map what it made.

Looking at the files of ImageNet takes 11 s, mapping its manifest some milliseconds. Imports no torch.
"""

import json
import os
from collections.abc import Mapping

from pipelines import datasets, remote
from pipelines.manifest import Manifest
from service.config import TrainingConfig
from service.errors import DataError

# From the launcher to the workers it starts: what `announcement` gives.
VARIABLE = "LOROT_MANIFESTS"
_KEYS = ("train_split", "eval_split")


def load(job: TrainingConfig) -> tuple[Manifest, Manifest]:
    """The training and the evaluation split; looks at all files, and makes their manifests if they have changed.

    Raises:
        DataError: as `datasets.load`.
    """
    use_cache(job)
    train_set, eval_set = (
        datasets.load(job.data.name, job.data.root, getattr(job.data, key), **job.data.options) for key in _KEYS
    )
    return train_set, eval_set


def use_cache(job: TrainingConfig) -> None:
    """Keep what lies below a URL where the job says; to be called before its data are opened."""
    remote.use_cache(job.data.cache_folder, int(job.data.cache_gb * 10**9))


def announcement(splits: tuple[Manifest, Manifest]) -> str:
    """Where the two manifests lie and what they say, in a line of text for another process of this machine."""
    return json.dumps([[str(manifest.path), manifest.digest] for manifest in splits])


def map_announced(job: TrainingConfig, announced: str) -> tuple[Manifest, Manifest]:
    """The splits that another process of this machine has loaded for the same job; no file of the data is looked at.

    Raises:
        DataError: they were made anew since, from files that had changed.
    """
    use_cache(job)
    train_set, eval_set = (_map(job, key, *found) for key, found in zip(_KEYS, json.loads(announced), strict=True))
    return train_set, eval_set


def announced_here(environment: Mapping[str, str] = os.environ) -> str | None:
    """What the process that started this one has announced, if it has."""
    return environment.get(VARIABLE)


def _map(job: TrainingConfig, key: str, path: str, digest: str) -> Manifest:
    manifest = Manifest.open(path, job.data.root)
    if manifest.digest != digest:
        raise DataError(
            f"{job.data.root}: split {getattr(job.data, key)!r} has changed since this job began (its digest was "
            f"{digest[:12]}, now {manifest.digest[:12]}); put the files back, or train anew with name=OTHER"
        )
    return manifest
