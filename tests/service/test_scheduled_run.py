"""A worker whose run the job service has made: it goes on with that run, and with no other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from service import config, run_creation, store, tracking
from service.config import TrackingConfig, TrainingConfig
from service.delivery import HOLDER, RESUMED
from service.errors import ConfigError, TrackingError
from service.jobs import checking, manifests
from service.run_folder import RunFolder
from service.training import job as training
from tests.service import kubernetes_orders
from tests.service.job_specs import CONFIG

QUIET = TrackingConfig(system_metrics=False)


@pytest.fixture
def scheduled(place: str) -> str:
    run_id = run_creation.create_run(store.default_uri(), "lorot", "submitted")
    store.client().update_run(run_id, status="SCHEDULED")
    return run_id


def worker(folder: Path, scheduled: str) -> tracking.Run:
    return tracking.open_run(QUIET, name="run", folder=folder, scheduled=scheduled)


def test_the_job_s_run_becomes_the_worker_s_and_counts_as_begun_not_as_resumed(scheduled: str, tmp_path: Path) -> None:
    run = worker(tmp_path / "run", scheduled)
    run.log_params({"lr": 0.1})
    assert run.settle(20)
    found = store.client().get_run(scheduled)
    assert (run.run_id, run.resumed, found.info.status) == (scheduled, 0, "RUNNING")
    assert found.data.params == {"lr": "0.1"}
    assert HOLDER in found.data.tags
    assert RESUMED not in found.data.tags
    assert run.finish() == ""
    assert len(store.client().search_runs([found.info.experiment_id])) == 1


def test_a_later_attempt_in_a_new_folder_has_the_last_word_on_the_run(scheduled: str, tmp_path: Path) -> None:
    worker(tmp_path / "run", scheduled).finish("FAILED")
    second = worker(tmp_path / "other", scheduled)
    assert second.resumed == 1
    second.finish("FINISHED")
    third = worker(tmp_path / "third", scheduled)
    assert third.resumed == 2
    third.finish("KILLED")
    assert store.client().get_run(scheduled).info.status == "KILLED"


def test_a_run_that_the_server_does_not_know_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="knows no run"):
        worker(tmp_path / "run", "0" * 32)


def open_run(folder: Path, resume: bool) -> tracking.Run:
    given: dict[str, Any] = {"tracking": {"system_metrics": False}, "output": str(folder.parent), "name": folder.name}
    return begin(config.resolve(given | {"data": {"name": "demo", "size": 32}}), resume)


def begin(job: TrainingConfig, resume: bool) -> tracking.Run:
    """As a training does."""
    folder = job.folder
    manifest: Any = SimpleNamespace(name="demo", digest="d")
    world: Any = SimpleNamespace(size=1, device=SimpleNamespace(type="cpu"))
    task: Any = SimpleNamespace(tags=dict)
    lengths: Any = SimpleNamespace(total=12)
    folder.mkdir(parents=True, exist_ok=True)
    return training._open_run(job, RunFolder(folder), world, manifest, manifest, task, lengths, resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_takes_the_run_of_its_environment_first_and_resumes_it_later(
    scheduled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    monkeypatch.setenv("LOROT_RUN_ID", scheduled)
    first = open_run(tmp_path / "run", resume)
    first.finish("KILLED")
    told = RunFolder(tmp_path / "run").read("run.json")
    assert (told["run_id"], told["resumed"], told["total_steps"]) == (scheduled, 0, 12)
    second = open_run(tmp_path / "run", resume=True)
    second.finish()
    assert (second.run_id, second.resumed) == (scheduled, 1)
    assert store.client().get_run(scheduled).info.status == "FINISHED"


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_in_the_folder_is_not_touched(
    scheduled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    before = open_run(tmp_path / "run", resume=False)
    before.finish()
    content = (tmp_path / "run" / "run.json").read_bytes()
    monkeypatch.setenv("LOROT_RUN_ID", scheduled)
    with pytest.raises(ConfigError, match=f"holds run {before.run_id}, and this job is run {scheduled}"):
        open_run(tmp_path / "run", resume)
    assert (tmp_path / "run" / "run.json").read_bytes() == content
    assert store.client().get_run(scheduled).info.status == "SCHEDULED"


def test_a_worker_of_an_exported_train_job_opens_a_run_of_its_own_and_goes_on_with_that(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = kubernetes_orders.settings(tmp_path, data_claim="data")
    given = {**CONFIG, "data": {**CONFIG["data"], "root": "/data/demo"}, "tracking": {"system_metrics": False}}
    spec = kubernetes_orders.job(config=given).spec
    opened = []
    for number in (1, 2):
        export, part = manifests.documents(spec, service, checking.resolve(spec, service), "trainjob")
        for variable in export["spec"]["trainer"]["env"]:
            monkeypatch.setenv(variable["name"], variable["value"])
        # As another machine reaches it.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        told = yaml.safe_load(part["data"]["job.yaml"])
        job = config.resolve(told | {"output": str(tmp_path / str(number))})
        assert "--resume" in export["spec"]["trainer"]["command"]
        for resumed in (0, 1):
            run = begin(job, resume=True)
            run.finish("KILLED")
            assert run.resumed == resumed
            opened.append(run.run_id)
        assert store.client().get_run(run.run_id).info.run_name == "a-run"
    assert opened[0] == opened[1] != opened[2] == opened[3]
