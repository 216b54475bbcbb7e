"""Whether a job may be submitted here: its configuration, its paths, its secrets, whether it ever fits. No torch."""

import copy
from collections.abc import Mapping
from typing import Any

from pipelines.amounts import shown_bytes
from service import config, config_file
from service.config import TrainingConfig
from service.errors import ConfigError
from service.jobs import allowed, orders, scratch, traits
from service.jobs.backends import Backend
from service.jobs.job import Job
from service.jobs.queue import Amount
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec, num_bytes

# Of a job that is only looked at.
_NO_ID = "0" * 32
# Which kinds of configuration a kind of job takes.
_JOBS: Mapping[str, str] = {"train": "classify", "detect": "detect", "segment": "segment"}


def check(
    spec: JobSpec,
    settings: ServiceSettings,
    backend: Backend,
    capacity: Amount,
    recorded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The resolved configuration of a job that may be submitted, or started once more; empty for a container.

    Args:
        recorded: what it was resolved to when it was submitted, if that is a while ago.

    Raises:
        ConfigError: what is wrong with it, or what of it this service does not allow or have.
        BackendError: the place where it is to run does not answer.
    """
    if spec.retries > settings.limits.retries:
        raise ConfigError(f"retries: {spec.retries} are more than this service allows, {settings.limits.retries}")
    orders.refuse_unreachable(spec, settings)
    place = traits.of(spec.backend)
    if place.uses_this_machine:
        _refuse_too_large(spec, capacity)
    if spec.secrets and not place.keeps_secrets:
        orders.secret_values(spec, settings)
    resolved = starts_with(spec, settings, recorded)
    backend.check(Job(_NO_ID, "", spec, "queued"))
    # After it: a backend may know better what to use instead.
    if spec.mounts and not place.takes_mounts:
        raise ConfigError(f"mounts: {spec.backend} jobs see no folders of a host; leave them away")
    return resolved


def starts_with(spec: JobSpec, settings: ServiceSettings, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """What a job is given: what it was submitted with, whatever the defaults are by now; empty for a container.

    Raises:
        ConfigError: it may not be started any more.
    """
    if spec.kind == "container":
        return {}
    if recorded is None:  # new, or recorded by a version that kept none
        return resolve(spec, settings)
    # Another version may not know all its keys.
    config.resolve_any(copy.deepcopy(recorded), source="config")
    return admitted(recorded, spec, settings)


def resolve(spec: JobSpec, settings: ServiceSettings) -> dict[str, Any]:
    """The configuration with every key, as JSON has it; raises ConfigError."""
    if not spec.config:
        raise ConfigError("config: is empty; give what a file as configs/quickstart.yaml has, as {data: {name: demo}}")
    given = copy.deepcopy(spec.config)
    allowed.own_keys(given)
    # Before anything reads what they name.
    allowed.paths(given, settings, spec.backend)
    kind = _JOBS[spec.kind]
    if (job := given.setdefault("job", kind)) != kind:
        fits = next((name for name, other in _JOBS.items() if other == job), "none of train, detect and segment")
        raise ConfigError(f"config.job: {job!r} is no configuration for kind {spec.kind!r}; kind {fits!r} takes it")
    if spec.model is not None:
        given = _on_the_model(given, spec, settings)
    found = config.resolve_any(given, source="config")
    _check_workers(found, spec)
    resolved = found.model_dump(mode="json")
    resolved["data"]["cache_gb"] = scratch.cache_gb(found.data, spec.backend)
    # Roots are looked at once more: a default may lie outside of them, too.
    return admitted(resolved, spec, settings)


def admitted(resolved: dict[str, Any], spec: JobSpec, settings: ServiceSettings) -> dict[str, Any]:
    """A resolved configuration with its files named without links, independently of the working folder.

    Raises:
        ConfigError: it names what jobs may not read, or not any more.
    """
    allowed.paths(resolved, settings, spec.backend)
    data, model = {**resolved["data"]}, {**resolved["model"]}
    for section, name, key in ((data, "data", "root"), (model, "model", "init_from"), (model, "model", "backbone")):
        value = section.get(key)
        if isinstance(value, str) and not allowed.is_elsewhere(value):
            section[key] = str(allowed.inside(value, settings, f"config.{name}.{key}", spec.backend))
    return {**resolved, "data": data, "model": model}


def needs(spec: JobSpec) -> Amount:
    """What all nodes of a job take together."""
    asked, nodes = spec.resources, spec.most_nodes
    memory = num_bytes(asked.memory) if asked.memory is not None else 0
    return Amount(asked.gpus * nodes, asked.cpus * nodes, memory * nodes)


def _refuse_too_large(spec: JobSpec, capacity: Amount) -> None:
    needed = needs(spec)
    nodes = f" on {spec.most_nodes} nodes" if spec.most_nodes > 1 else ""
    if needed.gpus > capacity.gpus:
        raise ConfigError(
            f"resources.gpus: {needed.gpus} GPUs{nodes} never fit this machine, which has {capacity.gpus}"
        )
    if needed.memory > capacity.memory:
        raise ConfigError(
            f"resources.memory: {shown_bytes(needed.memory)}{nodes} never fit this machine, of which jobs may take "
            f"{shown_bytes(capacity.memory)}"
        )
    if not needed.fits(capacity):
        raise ConfigError(
            f"resources.cpus: {needed.cpus:g} cores{nodes} never fit this machine, which has {capacity.cpus:g}"
        )


def _on_the_model(given: dict[str, Any], spec: JobSpec, settings: ServiceSettings) -> dict[str, Any]:
    """The configuration with the model that the job names."""
    allowed.paths({"model": {"backbone": spec.model}}, settings, spec.backend)
    own = given.get("model", {})
    if not isinstance(own, dict):
        return given
    if own.get("backbone", spec.model) != spec.model:
        raise ConfigError(
            f"config.model.backbone: {own['backbone']!r} is another model than {spec.model!r}; leave it away"
        )
    return config_file.merge(given, {"model": {"backbone": spec.model}})


def _check_workers(found: TrainingConfig, spec: JobSpec) -> None:
    """Refuse a batch that the job's processes cannot share, as far as their number is known here."""
    workers = spec.workers or found.workers or spec.resources.gpus
    if workers and spec.fewest_nodes == spec.most_nodes:
        config.accumulation_steps(found, workers * spec.most_nodes)
