"""A job as tags of its MLflow run, and back. Imports no torch."""

import contextlib
import json
import math
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, get_args

from service.errors import ConfigError
from service.jobs.job import Attempt, Job, State
from service.jobs.spec import JobSpec
from service.naming import TAG_CHARS, legal_text

JOB = "lorot.job"
KEY = "lorot.key"
# Set once whoever has asked for the job was told of it.
TOLD = f"{JOB}.told"
_SPEC, _ATTEMPTS, _CONFIG = f"{JOB}.spec", f"{JOB}.attempts", f"{JOB}.config"
_KEY_CHARS = 200
# A request of MLflow takes a hundred tags.
_NUM_PIECES = 60
_DEFAULTS = {key: value for key, value in asdict(Attempt(0, "")).items() if key not in ("number", "name")}


def encode(job: Job) -> dict[str, str]:
    """The tags of a job, without its key.

    Raises:
        ConfigError: the spec is too long for the record.
    """
    # What is at its default is left out, and pure ASCII is taken by every database.
    spec = job.spec.model_dump(mode="json", exclude_defaults=True)
    attempts = [
        {key: value for key, value in asdict(attempt).items() if value != _DEFAULTS.get(key)}
        for attempt in job.attempts
    ]
    return {
        JOB: "1",
        f"{JOB}.state": job.state,
        f"{JOB}.owner": job.owner,
        f"{JOB}.reason": legal_text(job.reason)[:TAG_CHARS],
        f"{JOB}.cancel": "1" if job.cancel else "",
        f"{JOB}.resume": "1" if job.resume else "",
        f"{JOB}.failures": str(job.failures),
        f"{JOB}.submitted": repr(job.submitted_s),
        f"{JOB}.queued": repr(job.queued_s),
        f"{JOB}.ended": repr(job.ended_s),
        **_pieces(_SPEC, json.dumps(spec, separators=(",", ":"))),
        **_pieces(_ATTEMPTS, json.dumps(attempts, separators=(",", ":"))),
    }


def encode_config(resolved: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a resolved configuration; none of an empty one. They are set once: it never changes.

    Raises:
        ConfigError: it is too long for the record.
    """
    return _pieces(_CONFIG, json.dumps(resolved, separators=(",", ":"))) if resolved else {}


def decode_config(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """The resolved configuration of a job; None if its tags hold none.

    Raises:
        ConfigError: somebody has changed them.
    """
    if not (text := _joined(_CONFIG, tags)):
        return None
    with contextlib.suppress(ValueError):
        if isinstance(content := json.loads(text), dict):
            return content
    raise ConfigError(f"tag {_CONFIG} of the run holds no configuration any more; submit the job again")


def decode(job_id: str, experiment_id: str, tags: Mapping[str, str]) -> Job:
    """The job of a run; raises ValueError, with what is wrong, if the tags are no job's."""
    state = tags.get(f"{JOB}.state", "")
    if state not in get_args(State):
        raise ValueError(f"{JOB}.state is {state!r}")
    owner, key = client_key(tags.get(KEY, ""))
    return Job(
        id=job_id,
        experiment_id=experiment_id,
        spec=JobSpec.model_validate_json(_joined(_SPEC, tags)),
        state=state,  # type: ignore[arg-type]
        owner=tags.get(f"{JOB}.owner", owner),
        key=key,
        submitted_s=_number(tags.get(f"{JOB}.submitted")),
        ended_s=_number(tags.get(f"{JOB}.ended")),
        attempts=tuple(Attempt(**attempt) for attempt in json.loads(_joined(_ATTEMPTS, tags) or "[]")),
        reason=tags.get(f"{JOB}.reason", ""),
        cancel=bool(tags.get(f"{JOB}.cancel")),
        resume=bool(tags.get(f"{JOB}.resume")),
        failures=int(_number(tags.get(f"{JOB}.failures"))),
        queued_s=_number(tags.get(f"{JOB}.queued")),
    )


def changed(before: Job, after: Job) -> dict[str, str]:
    """The tags to be set so that the run says `after` and no longer `before`."""
    old, new = encode(before), encode(after)
    gone = dict.fromkeys(old.keys() - new.keys(), "")
    return {key: value for key, value in (new | gone).items() if old.get(key) != value}


def everything(job: Job, written: Iterable[str]) -> dict[str, str]:
    """The tags to be set so that the run says `job`, whichever of the tags in `written` it may have.

    The spec is left out: it never changes, and with it there may be more tags than a request takes.
    """
    tags = dict.fromkeys(written, "") | encode(job)
    return {key: value for key, value in tags.items() if not key.startswith(_SPEC)}


def rank(tags: Mapping[str, str]) -> tuple[bool, bool]:
    """(the job was started, whoever asked for it was told of it), by which twins are sorted out."""
    return _joined(_ATTEMPTS, tags) not in ("", "[]"), bool(tags.get(TOLD))


def run_key(owner: str, key: str) -> str:
    """What `lorot.key` holds for a client's key; no two (owner, key) have the same.

    Raises:
        ConfigError: the key is too long.
    """
    if len(key) > _KEY_CHARS:
        raise ConfigError(f"key: has {len(key)} characters; {_KEY_CHARS} at most, a UUID has 36")
    return f"{urllib.parse.quote(owner, safe='')}/{urllib.parse.quote(key, safe='')}"


def client_key(text: str) -> tuple[str, str]:
    """(owner, key) of what `run_key` has made; both empty for the key that a run has without a client's."""
    owner, slash, key = text.partition("/")
    return (urllib.parse.unquote(owner), urllib.parse.unquote(key)) if slash else ("", "")


def _pieces(name: str, text: str) -> dict[str, str]:
    """A text as one tag, or as several with a number each where one does not hold it."""
    if len(text) <= TAG_CHARS:
        return {name: text}
    parts = [text[start : start + TAG_CHARS] for start in range(0, len(text), TAG_CHARS)]
    if len(parts) > _NUM_PIECES:
        raise ConfigError(
            f"the job's description has {len(text):,} characters; the record takes {_NUM_PIECES * TAG_CHARS:,}"
        )
    return {name: ""} | {f"{name}.{number}": part for number, part in enumerate(parts)}


def _joined(name: str, tags: Mapping[str, str]) -> str:
    if whole := tags.get(name):
        return whole
    parts: list[str] = []
    while part := tags.get(f"{name}.{len(parts)}"):
        parts.append(part)
    return "".join(parts)


def _number(text: Any) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0
