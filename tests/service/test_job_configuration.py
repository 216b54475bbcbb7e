"""The resolved configuration of a job: in its run from the moment it is submitted, and what it starts with."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service import config, run_creation, store
from service.config import TrainingConfig
from service.errors import ConfigError
from service.jobs import job_tags
from service.jobs.job import Job
from service.jobs.record import Record
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.service.job_specs import settings, spec
from tests.service.memory_backend import MemoryBackend
from tests.service.stepped_service import Service, away


@pytest.fixture
def service(place: str, tmp_path: Path) -> Service:
    return Service(settings(tmp_path))


def tags(job: Job) -> dict[str, str]:
    return dict(store.client().get_run(job.id).data.tags)


def started_with(service: Service, job: Job) -> dict[str, Any]:
    """What the worker of a job is given."""
    content = yaml.safe_load((service.settings.results / job.id / "job.yaml").read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, with another default, from here on."""
    real = config.resolve_any

    def newer(values: dict[str, Any], source: str) -> TrainingConfig:
        values.setdefault("optimizer", {}).setdefault("momentum", 0.5)
        return real(values, source=source)

    monkeypatch.setattr(config, "resolve_any", newer)


def test_a_run_has_it_in_the_request_that_makes_it_and_memory_does_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[dict[str, str]] = []
    monkeypatch.setattr(run_creation, "set_tags", lambda uri, run_id, tags: later.append(tags))
    job = service.submit()
    assert [key for written in later for key in written if "config" in key] == []
    assert job_tags.decode_config(tags(job)) == service.desk.check(spec())
    assert service.desk.configuration(job.id)["optimizer"]["momentum"] == 0.9
    assert "momentum" not in repr(service.desk.get(job.id))


def test_a_queued_job_starts_with_what_was_recorded_although_the_defaults_are_others_by_then(
    service: Service, request: pytest.FixtureRequest
) -> None:
    job = service.submit()
    old, _ = Record(service.settings).create(spec())  # by a version that recorded none
    request.getfixturevalue("upgrade")
    service.restart()
    assert service.desk.check(spec())["optimizer"]["momentum"] == 0.5
    service.step()
    assert started_with(service, job)["optimizer"]["momentum"] == 0.9
    assert started_with(service, old)["optimizer"]["momentum"] == 0.5
    # Begun anew it is the same job.
    service.backend.end(service.name(job), 2)
    service.step()
    service.desk.retry(job.id)
    service.step(2)
    assert service.name(job).endswith("-2")
    assert started_with(service, job)["optimizer"]["momentum"] == 0.9
    # What was recorded without is known from its folder.
    assert service.desk.configuration(old.id)["optimizer"]["momentum"] == 0.5


@pytest.mark.parametrize("what", ["retry", "resume"])
def test_a_job_starts_again_by_what_was_recorded_where_its_spec_would_be_refused_by_now(
    what: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()
    service.step()
    service.backend.end(service.name(job), 2)
    service.step()
    real = config.resolve_any

    def stricter(values: dict[str, Any], source: str) -> TrainingConfig:
        if "momentum" not in values.get("optimizer", {}):
            raise ConfigError("optimizer.momentum has no default any more")
        if "mixup" in values:
            raise ConfigError("mixup is unknown")
        return real(values, source=source)

    monkeypatch.setattr(config, "resolve_any", stricter)
    with pytest.raises(ConfigError, match="no default any more"):
        service.desk.check(spec())
    getattr(service.desk, what)(job.id)
    service.step(2)
    assert service.name(job).endswith("-2")
    # And what this version does not know is refused before anything starts.
    service.backend.end(service.name(job), 2)
    service.step()
    with monkeypatch.context() as patch:
        newer = {**service.desk.configuration(job.id), "mixup": 0.2}
        patch.setattr(Record, "configuration", lambda record, job_id: newer)
        with pytest.raises(ConfigError, match="mixup is unknown"):
            getattr(service.desk, what)(job.id)
    assert service.state(job) == "failed"


def test_a_job_waits_for_the_record_and_does_not_start_by_other_defaults(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()

    with monkeypatch.context() as patch:
        patch.setattr(Record, "configuration", away)
        service.step(3)
        assert service.backend.running() == []
    service.step()
    assert service.state(job) == "running"


def test_a_long_one_is_kept_in_pieces_and_a_damaged_one_fails_the_job_with_the_reason(service: Service) -> None:
    names = {f"class-{number:04}": f"é{number}" for number in range(1500)}
    resolved = {**service.desk.check(spec()), "note": names}
    assert job_tags.decode_config(job_tags.encode_config(resolved)) == resolved
    assert len(job_tags.encode_config(resolved)) > 3
    job = service.submit()
    store.client().set_tag(job.id, "lorot.job.config", "{")
    service.step()
    assert service.state(job) == "failed"
    assert "lorot.job.config" in service.desk.get(job.id).reason


def test_a_container_has_none(place: str, tmp_path: Path) -> None:
    own = ServiceSettings(**{**settings(tmp_path).model_dump(), "backends": {"docker": {"enabled": True}}})
    record = Record(own)
    job, _ = record.create(JobSpec(kind="container", backend="docker", command=("true",)), {})
    assert record.configuration(job.id) is None
    assert not any(key.startswith("lorot.job.config") for key in tags(job))


def test_a_container_starts_and_starts_again_without_a_question_for_what_it_cannot_have(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Record, "configuration", away)
    own = settings(tmp_path, backends={"docker": {"enabled": True}})
    service = Service(own, docker=MemoryBackend("docker"))
    job, _ = service.desk.submit(JobSpec(kind="container", backend="docker", command=("true",), retries=0))
    for number in (1, 2):
        service.step(2)
        assert (service.state(job), service.name(job)[-2:]) == ("running", f"-{number}")
        service.backends["docker"].end(service.name(job), 1)
        service.step(2)
        assert service.state(job) == "failed"
        service.desk.retry(job.id)
