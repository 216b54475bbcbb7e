"""Jobs to test the job service with: a configuration that passes every check, and settings in a test's own folder."""

import copy
from pathlib import Path
from typing import Any

from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

CONFIG: dict[str, Any] = {
    "duration": "10 steps",
    "global_batch": 8,
    "micro_batch": 2,
    "device": "cpu",
    "data": {"name": "demo", "root": "data/demo", "size": 32, "options": {"train_count": 40, "val_count": 20}},
    "model": {"name": "resnet_small", "width": 8},
}


def spec(**fields: Any) -> JobSpec:
    return JobSpec(**{"config": copy.deepcopy(CONFIG), **fields})


def with_config(key: str, value: Any) -> JobSpec:
    """The same with one value set, by its dotted key."""
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    inner = config
    for name in path:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return JobSpec(config=config)


def settings(folder: Path, **fields: Any) -> ServiceSettings:
    own: dict[str, Any] = {"state": folder / "state", "results": folder / "jobs", "gpus": 4, "cpus": 8.0}
    own["memory"] = "64GB"
    own |= {"worker_tracking_uri": "http://inside:5000"}
    return ServiceSettings(**{**own, "data_roots": (folder / "data",), **fields})
