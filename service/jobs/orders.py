"""From a job to what a backend starts: its configuration file, its command, its variables. Imports no torch."""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service import artifact_places, plain_files, store
from service.errors import ConfigError, StorageError
from service.jobs import traits
from service.jobs.backends import Order
from service.jobs.job import Attempt, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

CONFIGURATION = "job.yaml"
RUN = "run"
OUTPUTS = "outputs"
ATTEMPTS = "attempts"
# In the place of HOST:PORT; a backend that starts several nodes fills it in.
RENDEZVOUS = "{rendezvous}"
# Failures in a row that the launcher restarts by itself, before the attempt has failed.
_RESTARTS = 3
_PRIVATE, _PASSABLE = 0o700, 0o711


@dataclass(frozen=True)
class Places:
    """Where a job sees things.

    Attributes:
        folder: its own. Local: the host's path; in a container: /job.
        results: where a container job leaves its outputs. In a container: /results.
        tracking_uri: MLflow as the job reaches it; "" if it cannot.
    """

    folder: str
    results: str
    tracking_uri: str


def folder_of(settings: ServiceSettings, job_id: str) -> Path:
    """A job's own folder on this machine, absolute."""
    return (settings.results / job_id).absolute()


def attempt_folder(settings: ServiceSettings, job_id: str, number: int) -> Path:
    """Where the log and the end of an attempt are kept."""
    return folder_of(settings, job_id) / ATTEMPTS / str(number)


def tracking_uri(settings: ServiceSettings) -> str:
    """MLflow as the service reaches it, independent of the working folder."""
    return store.absolute(settings.tracking_uri or store.default_uri())


def places(spec: JobSpec, folder: Path, settings: ServiceSettings) -> Places:
    """Where a job of this spec, whose folder on this machine is `folder`, sees things."""
    uri = tracking_uri(settings)
    if not traits.of(spec.backend).in_containers:
        return Places(str(folder), str(folder / OUTPUTS), uri)
    uri = settings.worker_tracking_uri or uri
    # A file of this machine is not seen from within a container.
    return Places("/job", "/results", "" if store.sqlite_path(uri) else uri)


def order(
    job: Job, attempt: Attempt, settings: ServiceSettings, resolved: Mapping[str, Any], gpus: tuple[int, ...] = ()
) -> Order:
    """What the job's backend is to start for this attempt.

    Args:
        resolved: the configuration, as `Desk.check` returns it; empty for a container.
        gpus: of this machine that are the attempt's.

    Raises:
        ConfigError: jobs in containers do not reach the tracking database.
    """
    folder = folder_of(settings, job.id)
    refuse_unreachable(job.spec, settings)
    where = places(job.spec, folder, settings)
    return Order(
        name=attempt.name,
        job=job,
        folder=folder,
        command=_command(job, attempt, where),
        environment=_environment(job, attempt, where, settings),
        number=attempt.number,
        gpus=gpus,
    )


def refuse_unreachable(spec: JobSpec, settings: ServiceSettings) -> None:
    """Raises ConfigError if a job of this spec is to be recorded and does not reach the tracking database."""
    if spec.kind != "container" and not places(spec, settings.results, settings).tracking_uri:
        raise ConfigError(
            f"backend: {spec.backend} jobs do not see {store.shown(tracking_uri(settings))}, a file of this machine; "
            "start an MLflow server and name it in the service's settings (tracking_uri, worker_tracking_uri)"
        )


def prepare(order: Order, settings: ServiceSettings, resolved: Mapping[str, Any]) -> None:
    """Make the job's folder with what the command of the order reads there; repeated, it changes nothing.

    Before an attempt that is to begin anew, what an earlier one has left is set aside, as run.1 or outputs.1.

    Raises:
        StorageError: it cannot be written.
    """
    folder, spec = order.folder, order.job.spec
    own = traits.of(spec.backend)
    try:
        attempt = folder / ATTEMPTS / str(order.number)
        if not order.job.resume and not attempt.exists():
            # Once: where the attempt's folder is, what lies there may be this attempt's own.
            _set_aside(folder / RUN)
            _set_aside(folder / OUTPUTS)
        # Others on this machine see neither; the user of a container gets through to run/ and outputs/, which are its.
        mode = _PASSABLE if own.in_containers else _PRIVATE
        for place, allowed in ((folder, mode), (attempt.parent, _PRIVATE), (attempt, _PRIVATE)):
            place.mkdir(mode=allowed, parents=True, exist_ok=True)
            # A disk that has no such rights is the operator's choice.
            with contextlib.suppress(PermissionError):
                place.chmod(allowed)
        if own.in_containers and not own.gives_folders:
            # What is missing of the paths that a container mounts is made as root's by who starts it.
            for name in (RUN, OUTPUTS):
                (folder / name).mkdir(exist_ok=True)
        if spec.kind == "container":
            # What is given to the containers' user is its alone.
            (folder / OUTPUTS).mkdir(mode=_PRIVATE, exist_ok=True)
            return
        content = yaml.safe_dump(configuration(order.job, settings, resolved), sort_keys=False)
        with plain_files.writing(folder, CONFIGURATION) as file:
            file.write(content.encode())
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); results: chooses another place") from None


def configuration(job: Job, settings: ServiceSettings, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What job.yaml holds: `resolved` with the places that the service chooses; the run folder is FOLDER/run."""
    where = places(job.spec, folder_of(settings, job.id), settings)
    # The tracking server is given by MLFLOW_TRACKING_URI: as the job reaches it, and without a password in a file.
    tracking = {**resolved.get("tracking", {}), "uri": None, "experiment": experiment(job.spec, settings)}
    return {**resolved, "name": RUN, "output": where.folder, "tracking": tracking}


def experiment(spec: JobSpec, settings: ServiceSettings) -> str:
    """The MLflow experiment of a job of this spec."""
    tracking = spec.config.get("tracking")
    configured = tracking.get("experiment") if isinstance(tracking, dict) else None
    return spec.experiment or (configured if isinstance(configured, str) else "") or settings.experiment


def secret_values(spec: JobSpec, settings: ServiceSettings) -> dict[str, str]:
    """The variables of a job that are secrets, read now; for its environment alone, never for a file or a log.

    Raises:
        ConfigError: the service has no such secret; which one, and where it looks.
    """
    values = {}
    for variable, name in spec.secrets.items():
        if settings.secrets is None:
            raise ConfigError(
                f"secrets.{variable}: this service keeps no secrets; settings key `secrets` names a folder"
            )
        try:
            value = (settings.secrets / name).read_text().rstrip("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise ConfigError(
                f"secrets.{variable}: no secret {name!r} can be read in {settings.secrets} ({reason})"
            ) from None
        if "\0" in value:
            raise ConfigError(
                f"secrets.{variable}: secret {name!r} in {settings.secrets} has a NUL, which no variable can hold; "
                "write it as text"
            )
        values[variable] = value
    return values


def _command(job: Job, attempt: Attempt, where: Places) -> tuple[str, ...]:
    spec = job.spec
    if spec.kind == "container":
        return spec.command
    # By the interpreter's own name: what `lorot` means here is up to the PATH.
    program = ("lorot",) if traits.of(spec.backend).in_containers else (sys.executable, "-m", "service.cli")
    file = f"{where.folder}/{CONFIGURATION}"
    line = [*program, spec.kind]
    line += [file] if spec.kind == "train" else ["--model", str(spec.model), "--config", file]
    if job.resume:
        line.append("--resume")
    if spec.workers is not None:
        line += ["--workers", str(spec.workers)]
    line += ["--max-restarts", str(_RESTARTS)]
    if spec.most_nodes > 1:
        line += ["--nnodes", spec.nodes, "--rdzv", RENDEZVOUS, "--run-id", attempt.name]
    return tuple(line)


def _environment(job: Job, attempt: Attempt, where: Places, settings: ServiceSettings) -> dict[str, str]:
    ours = {"LOROT_RUN_ID": job.id, "LOROT_JOB_ATTEMPT": str(attempt.number), "LOROT_JOB_NAME": job.spec.name}
    if where.tracking_uri:
        ours["MLFLOW_TRACKING_URI"] = where.tracking_uri
    if not traits.of(job.spec.backend).in_containers:
        # It opens files as the service itself.
        ours[artifact_places.VARIABLE] = json.dumps(artifact_places.absolute(settings.artifact_roots))
    return {**job.spec.environment, **ours}


def _set_aside(folder: Path) -> None:
    """Rename a folder to NAME.1, or the next free number."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
