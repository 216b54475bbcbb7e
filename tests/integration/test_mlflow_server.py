"""The record of a job over HTTP, with a real `mlflow server` that dies in the middle."""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from record_server import Server

from pipelines.plan import View
from service import bundle, models, recovery, registry, store, tracking
from service.artifact_places import PlaceError
from service.config import ModelConfig, TrackingConfig
from service.delivery import StrictDelivery
from service.errors import CheckpointError, ConfigError, TrackingError
from service.jobs.desk import Desk
from service.spool import RefusedError, Sender
from tests.service.job_specs import settings, spec
from tests.service.memory_backend import MemoryBackend

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


@pytest.fixture
def server(started: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, answering. Each test has an experiment and a model name of its own."""
    monkeypatch.setenv("LOROT_CACHE", str(tmp_path / "cache"))
    # As every command has it: set by the first import of MLflow, which another test may have done.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    # A server that has just been started may answer late on a busy machine; a job would not wait for it so long.
    monkeypatch.setattr(Sender.drain, "__defaults__", (120.0,))
    started.start()
    return started


def config(server: Server, experiment: str = "lorot") -> TrackingConfig:
    return TrackingConfig(uri=server.uri, experiment=experiment, system_metrics=False)


def test_a_server_killed_in_mid_run_and_started_again_has_one_run_with_every_record_once_and_in_order(
    server: Server, tmp_path: Path
) -> None:
    run = tracking.open_run(config(server, "killed"), name="job", folder=tmp_path / "run", tags={"data.digest": "abc"})
    run.log_params({"optimizer": {"lr": 0.1}})
    for step in range(1, 201):
        run.log_metrics({"train/loss": 1 / step, "train/top1": float("nan")}, step)
        time.sleep(0.005)
        if step == 80:
            server.kill()
    durations_s = []
    for step in range(201, 401):
        began = time.perf_counter()
        run.log_metrics({"train/loss": 1 / step}, step)
        durations_s.append(time.perf_counter() - began)
    (tmp_path / "run" / "summary.json").write_text("{}")
    run.log_artifact(tmp_path / "run" / "summary.json")
    run.log_text("seed: 0\n", "config.yaml")
    ended_ms = time.time() * 1000
    # Not the longest of so many: that is the machine's.
    assert statistics.median(durations_s) < 0.05
    assert run.unsent() > 200

    server.start()
    assert run.finish(timeout_s=120) == ""
    api = tracking.client(server.uri)
    (found,) = api.search_runs([api.get_experiment_by_name("killed").experiment_id])
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")
    assert found.data.params == {"optimizer.lr": "0.1"}
    assert found.data.tags["data.digest"] == "abc"
    history = api.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 401)]
    assert all(before.timestamp <= after.timestamp for before, after in itertools.pairwise(history))
    # The times are those of the writing: nothing was written while the server was being started.
    assert history[-1].timestamp <= ended_ms
    assert len(api.get_metric_history(run.run_id, "train/top1")) == 200
    assert sorted(item.path for item in api.list_artifacts(run.run_id)) == ["config.yaml", "summary.json"]


def test_a_job_that_ends_while_the_server_is_away_says_where_its_records_are_and_they_can_be_sent(
    server: Server, tmp_path: Path
) -> None:
    run = tracking.open_run(config(server), name="job", folder=tmp_path / "run")
    run.log_metrics({"loss": 1.0}, 1)
    server.kill()
    run.log_metrics({"loss": 2.0}, 2)
    began = time.monotonic()
    notice = run.finish(timeout_s=1)
    assert time.monotonic() - began < 25
    assert str(tmp_path / "run" / "spool.jsonl") in notice
    with pytest.raises(TrackingError, match="does not answer"):
        recovery.sync(tmp_path / "run")
    server.start()
    assert recovery.sync(tmp_path / "run").sent > 0
    api = tracking.client(server.uri)
    assert [point.value for point in api.get_metric_history(run.run_id, "loss")] == [1.0, 2.0]
    assert api.get_run(run.run_id).info.status == "FINISHED"


def test_models_are_registered_and_found_over_http(server: Server, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_config = ModelConfig(name="resnet_small", width=8)
    model = models.build(model_config, 2, 4).eval()
    versions = []
    for number, top1 in enumerate((0.5, 0.25)):
        run = tracking.open_run(config(server), name=f"job-{number}", folder=tmp_path / f"run-{number}")
        run.finish()
        card = registry.Card(
            model=model_config.model_dump(mode="json"),
            classes=("cat", "dog"),
            view=bundle.evaluation_view(View(size=32)),
            num_pretext=4,
            metrics={"val/top1": top1},
            run_id=run.run_id,
        )
        folder = tmp_path / f"run-{number}" / "model"
        registry.write_bundle(folder, model.state_dict(), card)
        versions.append(
            registry.register(folder, name="demo", run_id=run.run_id, metric="val/top1", tracking_uri=server.uri)
        )
    assert versions == [1, 2]
    rows = registry.list_models(server.uri)
    assert [(row.version, row.aliases, row.metrics["val/top1"]) for row in rows] == [
        (2, ("latest",), 0.25),
        (1, ("best",), 0.5),
    ]

    again, card, resolved = registry.load("models:/demo@best", server.uri)
    assert (resolved.uri, card.run_id) == ("models:/demo/1", resolved.run_id)
    assert torch.equal(again.fc.weight, model.fc.weight)
    # Fetched once, kept by content, and fetched again when the kept copy is damaged.
    weights = resolved.folder / "model.safetensors"
    assert tmp_path / "cache" in weights.parents
    stamp = weights.stat().st_mtime_ns
    assert registry.resolve("models:/demo/1", server.uri).folder == resolved.folder
    assert weights.stat().st_mtime_ns == stamp
    weights.write_bytes(b"half")
    registry.load("models:/demo/1", server.uri)
    with pytest.raises(CheckpointError, match="aliases: best, latest"):
        registry.resolve("models:/demo@nothing", server.uri)

    (tmp_path / "wsol").mkdir()
    _, notice = registry.log_downstream(
        resolved, "wsol", {"gt_known@0.5": 0.75}, tracking_config=config(server), folder=tmp_path / "wsol"
    )
    assert notice == ""
    assert registry.list_models(server.uri)[1].downstream == {"wsol.gt_known@0.5": 0.75}

    server.kill()
    with pytest.raises(TrackingError, match="does not answer"):
        registry.load("models:/demo@best", server.uri)


def test_a_job_s_experiment_that_leads_to_the_services_files_is_refused_and_nothing_is_written_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As a job can, which reaches MLflow without a password.
    theirs = store.client(server.uri)
    trap = theirs.create_experiment(f"trap-{tmp_path.name}", artifact_location=(tmp_path / "outside").as_uri())
    own = settings(tmp_path, tracking_uri=server.uri)
    desk = Desk(own, backends={"local": MemoryBackend()})
    with pytest.raises(ConfigError, match=r"^experiment: 'trap-.*' keeps artifacts at file:///.*artifact_roots"):
        desk.submit(spec(experiment=f"trap-{tmp_path.name}"))
    assert theirs.search_runs([trap]) == []
    job, _ = desk.submit(spec(experiment=f"sound-{tmp_path.name}"))
    # A run that they make themselves, and say is a job.
    forged = theirs.create_run(trap, tags=theirs.get_run(job.id).data.tags | {"lorot.key": "other"}).info.run_id
    (tmp_path / "output.txt").write_text("attacker-named")
    for _ in range(2):
        with pytest.raises(PlaceError):
            desk.record.upload(forged, tmp_path / "output.txt")
    with pytest.raises(RefusedError):
        StrictDelivery(server.uri, forged, tmp_path, ())([{"op": "artifact", "path": "output.txt", "time_ms": 1}])
    assert not (tmp_path / "outside").exists()
    # Through the server itself they go as ever.
    desk.record.upload(job.id, tmp_path / "output.txt", "below")
    assert [entry.path for entry in theirs.list_artifacts(job.id, "below")] == ["below/output.txt"]
    with pytest.raises(PlaceError):
        desk.record.upload(forged, tmp_path / "output.txt")
