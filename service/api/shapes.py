"""What the API takes and gives, as JSON. Imports no web framework: commands show the same things without a server."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.config_fields import Section
from service.errors import ConfigError
from service.jobs import traits
from service.jobs.desk import Desk, Page
from service.jobs.job import Attempt, Job
from service.jobs.manifests import Format
from service.jobs.spec import JobSpec
from service.registry import Row

_DEEPEST = 32
_KEY = r"^[A-Za-z0-9._:-]{1,200}$"


def _plain(value: Any, depth: int = 0) -> Any:
    """Refuse what JSON can write and the record cannot keep; raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"blocks within blocks, more than {_DEEPEST} deep, are no configuration")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number of JSON; leave the key away, or write null")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number has 64 bits at most")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(str(key))
            _plain(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _plain(inner, depth + 1)
    return value


def _check_text(text: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a text holds a character that cannot be kept: NUL, or half of a surrogate pair")


class Submission(Section):
    """A job that is handed in."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "spec": {
                        "kind": "train",
                        "name": "demo",
                        "config": {
                            "data": {"name": "demo", "root": "data/demo"},
                            "model": {"name": "resnet_small"},
                            "duration": "2 epochs",
                        },
                    },
                    "key": "nightly-2026-11-22",
                }
            ]
        }
    )
    spec: Annotated[JobSpec, BeforeValidator(_plain)]
    key: str = Field(
        "", pattern=rf"{_KEY}|^$", description="the same key names the same job: sent again, nothing new is made"
    )


class Question(Section):
    """A job that is looked at, and not handed in."""

    spec: Annotated[JobSpec, BeforeValidator(_plain)]
    manifests: Format | None = Field(
        None, description="of a job that has some (kubernetes): as the service makes its objects, or as a TrainJob"
    )


class AttemptShape(BaseModel):
    """One start of a job; times in seconds since the epoch, 0 for not yet."""

    number: int
    name: str
    started_s: float
    ended_s: float
    exit_code: int | None
    reason: str
    image_digest: str


class JobShape(BaseModel):
    """A job as it stands; times in seconds since the epoch, 0 for not yet."""

    id: str
    experiment_id: str
    name: str
    kind: str
    backend: str
    state: str = Field(description="queued, starting, running, stopping, finished, failed or killed")
    owner: str = Field(description="name of the token that it was submitted with")
    submitted_s: float
    ended_s: float
    reason: str = Field(description="why it ended, or why it waits")
    cancel: bool = Field(description="somebody has asked to stop it")
    failures: int = Field(description="that count against its retries")
    attempts: list[AttemptShape]
    spec: dict[str, Any] = Field(description="as it was submitted")
    progress: dict[str, Any] | None = Field(None, description="of one job that was asked for by its id")


class PageShape(BaseModel):
    """Jobs, the newest first."""

    jobs: list[JobShape]
    next: str | None = Field(description="give it as `cursor` to have the next page; null on the last one")
    total: int = Field(description="jobs that fit the question, on all pages")
    partial: bool = Field(
        description="the service has just been started and still reads jobs that have ended: later there are more"
    )


class CheckShape(BaseModel):
    """What a job would be, were it handed in."""

    spec: dict[str, Any]
    config: dict[str, Any] = Field(description="with all defaults")
    manifests: list[dict[str, Any]] | None = Field(
        description="its objects in the cluster, if they were asked for; secrets are in them by their names"
    )


class ConfigShape(BaseModel):
    """What a job starts with."""

    config: dict[str, Any] = Field(
        description="with all defaults, as it was when the job was submitted; empty for a container"
    )


class QueueShape(BaseModel):
    """This machine's queue: what it has, what is taken, and whose turn it is."""

    model_config = ConfigDict(extra="allow")
    waiting: list[str] = Field(description="ids of jobs, in the order they will be started in")
    running: list[str]


class VersionShape(BaseModel):
    """A registered version of a model: how good, where from, and what was found out about it since."""

    name: str
    version: int
    aliases: list[str]
    metrics: dict[str, float | None]
    downstream: dict[str, float | None]
    data: str
    data_digest: str
    pretext: str
    objective: str
    run_name: str
    run_id: str
    created: str = Field(description="UTC, ISO 8601")


class ModelsShape(BaseModel):
    """Versions of models, by name, the newest first."""

    models: list[VersionShape]


class TokenShape(BaseModel):
    """A token, without its secret."""

    name: str
    scopes: list[str]
    created: str


class TokensShape(BaseModel):
    """All tokens."""

    tokens: list[TokenShape]


class TokenWish(Section):
    """A token that is to be made."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "ci", "scope": "submit"}]})
    name: str = Field(min_length=1, max_length=64, description="whose it is; jobs carry it as their owner")
    scope: str = Field("read", description="read, submit or admin; each may do what the ones before it may")


class NewTokenShape(TokenShape):
    """A token that was made; its secret is told here only."""

    token: str


class ErrorShape(BaseModel):
    """What went wrong."""

    type: str
    message: str = Field(description="what is wrong, where, and what would work")
    request_id: str = Field(description="as in the header X-Request-ID, and in the service's log")


class FaultShape(BaseModel):
    """The answer to every request that cannot be served."""

    error: ErrorShape


def job(job: Job, progress: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A job as JSON values; `JobShape` says what each one is."""
    return {
        "id": job.id,
        "experiment_id": job.experiment_id,
        "name": job.spec.name,
        "kind": job.spec.kind,
        "backend": job.spec.backend,
        "state": job.state,
        "owner": job.owner,
        "submitted_s": job.submitted_s,
        "ended_s": job.ended_s,
        "reason": job.reason,
        "cancel": job.cancel,
        "failures": job.failures,
        "attempts": [attempt(one) for one in job.attempts],
        "spec": job.spec.model_dump(mode="json"),
        "progress": None if progress is None else finite(dict(progress)),
    }


def checked(desk: Desk, spec: JobSpec, form: Format | None = None) -> dict[str, Any]:
    """What a job would be, as JSON values; `CheckShape` says what each one is. Raises as `Desk.check`."""
    config = desk.check(spec)
    answer = {"spec": spec.model_dump(mode="json"), "config": finite(config), "manifests": None}
    if form is None:
        return answer
    documents = traits.of(spec.backend).manifests
    if documents is None:
        have = traits.either(traits.those(lambda place: place.manifests))
        raise ConfigError(f"manifests: a {spec.backend} job has none; those of backend {have} have")
    return {**answer, "manifests": documents(spec, desk.settings, config, form)}


def page(found: Page) -> dict[str, Any]:
    """Jobs of a list as JSON values."""
    jobs = [job(one) for one in found.jobs]
    return {"jobs": jobs, "next": found.next, "total": found.total, "partial": found.is_partial}


def brief(job: Job) -> dict[str, Any]:
    """What an event says of a job: as `job`, without what may be long; `attempt` is the number of its newest one."""
    long = ("spec", "attempts", "progress")
    return {key: value for key, value in globals()["job"](job).items() if key not in long}


def attempt(attempt: Attempt) -> dict[str, Any]:
    """An attempt as JSON values; what the backend finds it by is its own."""
    return {
        "number": attempt.number,
        "name": attempt.name,
        "started_s": attempt.started_s,
        "ended_s": attempt.ended_s,
        "exit_code": attempt.exit_code,
        "reason": attempt.reason,
        "image_digest": attempt.image_digest,
    }


def version(row: Row) -> dict[str, Any]:
    """A model's version as JSON values."""
    return {
        "name": row.name,
        "version": row.version,
        "aliases": list(row.aliases),
        "metrics": finite(row.metrics),
        "downstream": finite(row.downstream),
        "data": row.data,
        "data_digest": row.data_digest,
        "pretext": row.pretext,
        "objective": row.objective,
        "run_name": row.run_name,
        "run_id": row.run_id,
        "created": row.created.isoformat(),
    }


def finite(value: Any) -> Any:
    """`value` with null for every number that JSON has no word for: a loss that became NaN is told so."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value if isinstance(value, int | str | bool) or value is None else str(value)
