"""From the options of `lorot submit` to a job, and from its end to an exit code."""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from service.errors import BackendError, ConfigError, JobError, TrackingError
from service.explaining import validated
from service.jobs import traits
from service.jobs.job import ENDED, State
from service.jobs.spec import KINDS, JobSpec

_KIND_OF = {"classify": "train", "detect": "detect", "segment": "segment"}
# Between two looks at a job that is waited for, seconds: more often at first.
_SOONEST_S, _LATEST_S = 0.2, 3.0
_CANCELLED = 130


@dataclass(frozen=True)
class Wish:
    """What was given on the command line; None and empty for what was not."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    kind: str | None = None
    backend: str | None = None
    name: str | None = None
    environment: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)


class Watched(Protocol):
    """What tells how a job stands."""

    def job(self, job_id: str) -> dict[str, Any]: ...


def spec(wish: Wish) -> JobSpec:
    """The job that is wished for, with its configuration in plain keys: the service has no files of ours.

    Raises:
        ConfigError: what is wrong, and what would work.
    """
    values = {key: value for key, value in wish.others.items() if value not in (None, (), [])}
    values["resources"] = {key: value for key, value in wish.resources.items() if value is not None}
    values["environment"], values["secrets"] = _pairs("--env", wish.environment), _pairs("--secret", wish.secrets)
    config = _config(wish)
    kind = wish.kind or ("container" if wish.command else _kind(config))
    check_choices(kind=kind, backend=wish.backend)
    if kind == "train" and wish.config is None:
        raise ConfigError("CONFIG is missing: name a configuration, as configs/quickstart.yaml, or a COMMAND after --")
    if wish.command:
        if wish.config is not None:
            raise ConfigError(
                f"{wish.config}: a configuration is for train, detect and segment; a container has its COMMAND after --"
            )
        values["command"] = wish.command
    values |= {"kind": kind, "config": config}
    values["backend"] = wish.backend or _usual(kind)
    stem = wish.config.stem if wish.config else Path(wish.command[0]).name if wish.command else kind
    called = str(config.get("name") or stem)
    values["name"] = wish.name or re.sub(r"[^A-Za-z0-9._-]+", "-", called)[:63].strip("._-") or "job"
    return validated(JobSpec, values, "this job")


def _usual(kind: str) -> str:
    """The first backend that can run it."""
    return traits.those(lambda place: place.in_containers)[0] if kind == "container" else traits.NAMES[0]


def check_choices(**chosen: str | None) -> None:
    """Raises ConfigError for a state, kind, backend or format that there is not."""
    known: dict[str, Sequence[str]] = {
        "state": get_args(State),
        "kind": KINDS,
        "backend": traits.NAMES,
        "format": ("objects", "trainjob"),
    }
    for option, value in chosen.items():
        if value is not None and value not in known[option]:
            raise ConfigError(f"--{option}: {value!r} is none of {', '.join(known[option])}")


def new_key() -> str:
    """A key that nobody has used."""
    return secrets.token_hex(16)


def preview(spec: JobSpec, *, form: str, as_json: bool, server: str | None, token: str, settings: Path | None) -> str:
    """What would be submitted, checked as it would be then: the spec, or its manifests where it has some.

    Args:
        form: of manifests: objects, as the service makes them, or trainjob, for Kubeflow.
        server: whose settings count; None: those of this machine, and nothing is written here.
        settings: file of these.

    Raises:
        ConfigError: it would be refused.
        BackendError: the service does not answer.
    """
    import yaml

    from service.jobs import manifests

    asked: manifests.Format = "trainjob" if form == "trainjob" else "objects"
    wanted = asked if traits.of(spec.backend).manifests or asked == "trainjob" else None
    if server:
        from service.client import Client

        with contextlib.closing(Client(server, token)) as there:
            checked = there.check(spec.model_dump(mode="json"), wanted)
    else:
        from service.api import shapes
        from service.jobs import settings_file
        from service.jobs.desk import Desk

        checked = shapes.checked(Desk(settings_file.load(settings)), spec, wanted)
    found = checked["spec"] if wanted is None else checked["manifests"]
    if as_json:
        return json.dumps(found, indent=1) + "\n"
    return str(yaml.safe_dump(found, sort_keys=False)) if wanted is None else manifests.text(found, asked)


def await_end(desk: Watched, job: Mapping[str, Any], *, say: Callable[[str], None]) -> dict[str, Any]:
    """The job once it has ended; `say` is told of every state on the way. A service that is away is waited for."""
    current, pause, silent = dict(job), _SOONEST_S, 0
    told = str(job["state"])
    while current["state"] not in ENDED:
        time.sleep(pause)
        pause = min(pause * 1.5, _LATEST_S)
        try:
            current, silent = desk.job(job["id"]), 0
        except (BackendError, TrackingError):
            silent += 1
            if silent > 20:
                raise
            continue
        if current["state"] != told:
            told, pause = current["state"], _SOONEST_S
            say(f"{job['id'][:12]} {told}")
    return current


def end_as(job: Mapping[str, Any]) -> None:
    """Return if the job finished; else raise JobError with the job's own exit code."""
    if job["state"] == "finished":
        return
    code = next((one["exit_code"] for one in reversed(job["attempts"]) if one["exit_code"] is not None), None)
    if not code:
        code = _CANCELLED if job["state"] == "killed" else 1
    # A shell says it so when a signal has ended a program.
    code = 128 - code if code < 0 else code
    raise JobError(f"job {job['id']} {job['state']}: {job['reason'] or 'its log says more'}", code)


def _config(wish: Wish) -> dict[str, Any]:
    from service import config_file

    if wish.config is None:
        if wish.overrides:
            raise ConfigError(f"{wish.overrides[0]!r}: values go on top of a CONFIG, and there is none")
        return {}
    if wish.command:
        return {}
    values = config_file.read(wish.config)
    for override in wish.overrides:
        config_file.assign(values, override)
    # Dates and the like, which YAML knows and JSON does not, are texts to every key there is.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _kind(config: Mapping[str, Any]) -> str:
    return _KIND_OF.get(str(config.get("job", "classify")), "train")


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {text!r}: write KEY=VALUE")
        pairs[key] = value
    return pairs
