"""Making the MLflow run of a new job, one for each client's key. Imports no torch."""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from service import artifact_places, run_creation, store
from service.errors import StateError, StorageError, TrackingError
from service.jobs import job_tags, orders, runs
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from service.run_creation import Made


def make(
    settings: ServiceSettings,
    uri: str,
    spec: JobSpec,
    resolved: Mapping[str, Any],
    owner: str,
    key: str,
    is_own: bool,
) -> tuple[Job, Made]:
    """Make the run of a new job, or find the one of this key, if that is not our own; raises as `Record.create`."""
    now = time.time()
    draft = Job("", "", spec, "queued", owner, key, submitted_s=now, queued_s=now)
    run_key = job_tags.run_key(owner, key)
    experiment, tags = orders.experiment(spec, settings), job_tags.encode(draft)
    # From the first moment on, in the same request: what it starts with is what was checked, whenever that is.
    tags |= job_tags.encode_config(resolved)
    roots = artifact_places.absolute(settings.artifact_roots)
    made = run_creation.create(
        uri, experiment, spec.name, tags=tags, key=run_key, is_own=is_own, rank=job_tags.rank, roots=roots
    )
    # What has none of this is known by its attempts, or is the earliest.
    with contextlib.suppress(TrackingError):
        run_creation.set_tags(uri, made.run_id, {job_tags.TOLD: "1"})
    if made.is_new:
        return replace(draft, id=made.run_id, experiment_id=made.experiment_id), made
    found = runs.one(uri, made.run_id)
    if not found:
        raise TrackingError(f"run {made.run_id} in {store.shown(uri)} has the key {key!r} and is no job")
    return found[0].job, made


@contextlib.contextmanager
def own_key() -> Iterator[str]:
    """A key for who has given none; where the answer is lost inside, they are told it.

    A refusal is passed on as it is: nothing was made, and the same is refused again.
    """
    own = secrets.token_hex(16)
    try:
        yield own
    except store.UnreachableError as error:
        advice = f"this may have come through; sent again with the key {own!r}, it makes no second job"
        raise store.UnreachableError(f"{error}; {advice}") from error


@contextlib.contextmanager
def turn(settings: ServiceSettings) -> Iterator[None]:
    """One process of this record after the other; raises StorageError if the state's folder cannot be written."""
    try:
        settings.state.mkdir(parents=True, exist_ok=True)
        lock = os.open(settings.state / "submit.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"state: {settings.state} cannot be written ({error.strerror})") from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def same(job: Job, spec: JobSpec) -> Job:
    """The job, if it is one of this spec; raises StateError."""
    if job.spec != spec:
        raise StateError(
            f"key {job.key!r} has been used for job {job.id}, whose spec is another one; a new job needs a new key"
        )
    return job
