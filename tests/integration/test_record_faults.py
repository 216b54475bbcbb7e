"""The record of a job in a real `mlflow server`, on both databases, behind a network and a server that misbehave."""

import hashlib
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import HANG, LOST, PASS, RESET, Fault, FaultProxy, Request
from processes import await_
from record_jobs import lines_of, lorot, write_config
from record_server import Server, answering

from pipelines.plan import View
from service import bundle, models, recovery, registry, tracking
from service.config import ModelConfig, TrackingConfig
from service.spool import Sender

pytestmark = pytest.mark.integration

NO_SUCH = '{"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"}'
BUSY = Fault(status=503, text="busy")
BROKEN = Fault(status=500, text='{"error_code": "INTERNAL_ERROR", "message": "a fault of the server"}')


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answering, on either database."""
    with answering(tmp_path_factory.mktemp(request.param), request.param) as made:
        yield made


@pytest.fixture
def proxy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setenv("LOROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    # Half a minute between two attempts is for real life.
    monkeypatch.setattr(Sender.__init__, "__defaults__", (Sender.__init__.__defaults__[0], 0.2))
    # The faults of one record may follow each other for longer than a job waits for a server that is gone.
    monkeypatch.setattr(Sender.drain, "__defaults__", (120.0,))
    made = FaultProxy(server.port)
    yield made
    made.close()


def reader(server: Server) -> Any:
    """A client of the server itself. From here on requests have time: a busy machine is none of the faults."""
    # The proxy's fixture puts it back.
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "60"
    return tracking.client(server.uri)


def config(proxy: FaultProxy, experiment: str) -> TrackingConfig:
    return TrackingConfig(uri=proxy.uri, experiment=experiment, system_metrics=False)


def written_model(folder: Path, run_id: str) -> Path:
    torch.manual_seed(0)
    model_config = ModelConfig(name="resnet_small", width=8)
    card = registry.Card(
        model=model_config.model_dump(mode="json"),
        classes=("cat", "dog"),
        view=bundle.evaluation_view(View(size=32)),
        metrics={"val/top1": 0.5},
        run_id=run_id,
    )
    registry.write_bundle(folder, models.build(model_config, 2, 0).state_dict(), card)
    return folder


def logged_value(key: int, step: int) -> float:
    """Not finite at times."""
    if step % 50 == 0:
        return (math.nan, math.inf, -math.inf)[key % 3]
    return (step + 1) / (key + 3)


def record_all(run: tracking.Run, folder: Path, steps: int, keys: int) -> None:
    """A short job with everything that a job records."""
    run.log_params({"optimizer": {"lr": 0.1}, "many": dict.fromkeys(map(str, range(150)), 1)})
    for step in range(1, steps + 1):
        run.log_metrics({f"m/{key}": logged_value(key, step) for key in range(keys)}, step)
        time.sleep(0.002)
    run.log_text("seed: 0\n", "config.yaml")
    (folder / "summary.json").write_text('{"name": "job", "model_version": null}\n')
    run.register_model(written_model(folder / "model", run.run_id), f"model-{run.run_id}", "val/top1", "max")
    run.log_artifact(folder / "summary.json")


def check_all(api: Any, run: tracking.Run, folder: Path, steps: int, keys: int) -> None:
    """What `record_all` recorded is there: complete, in order, once."""
    (found,) = api.search_runs([api.get_experiment_by_name(run.experiment).experiment_id])
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")
    assert len(found.data.params) == 151
    assert set(found.data.metrics) == {f"m/{key}" for key in range(keys)}
    for key in range(keys):
        history = api.get_metric_history(run.run_id, f"m/{key}")
        assert [point.step for point in history] == list(range(1, steps + 1))
        for point in history:
            expected = logged_value(key, point.step)
            if math.isinf(expected):
                # MLflow's databases keep the largest number instead.
                expected = math.copysign(1.7976931348623157e308, expected)
            assert point.value == expected or (math.isnan(point.value) and math.isnan(expected))
        assert all(before.timestamp <= after.timestamp for before, after in itertools.pairwise(history))
    files = {item.path for item in api.list_artifacts(run.run_id)}
    assert files == {"config.yaml", "summary.json", "model"}
    (version,) = api.search_model_versions(f"name='model-{run.run_id}'")
    assert version.run_id == run.run_id
    assert api.get_registered_model(f"model-{run.run_id}").aliases == {"best": version.version}
    assert f'"model_version": {version.version}' in (folder / "summary.json").read_text()


def losing_first_answers() -> Callable[[Request], Fault]:
    """Every request is served, and its first answer is lost."""
    seen: set[tuple[str, str, str]] = set()

    def plan(request: Request) -> Fault:
        what = (request.method, request.path, hashlib.sha256(request.body).hexdigest())
        if what in seen or request.path == "/health":
            return PASS
        seen.add(what)
        return LOST

    return plan


def test_every_request_is_served_twice_because_its_answer_was_lost_and_nothing_is_there_twice(
    server: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    proxy.plan = losing_first_answers()
    run = tracking.open_run(config(proxy, "lost answers"), name="job", folder=folder, tags={"data.digest": "abc"})
    record_all(run, folder, steps=60, keys=3)
    assert run.settle(120), run._sender.last_error
    assert run.finish(timeout_s=60) == ""
    created = [request for request, fault in proxy.requests if fault is LOST and request.path.endswith("/create")]
    assert {request.path.rpartition("mlflow/")[2] for request in created} >= {"runs/create", "model-versions/create"}
    check_all(reader(server), run, folder, 60, 3)


def test_a_storm_of_faults_of_every_kind_costs_no_record_and_no_order(
    server: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = tracking.open_run(config(proxy, "storm"), name="job", folder=folder)
    draw = random.Random(7)
    slow = Fault(delay_s=0.3)
    kinds = [PASS, PASS, PASS, PASS, slow, BROKEN, BUSY, Fault(status=429), RESET, LOST, HANG]
    proxy.plan = lambda request: draw.choice(kinds)
    record_all(run, folder, steps=300, keys=4)
    await_(lambda: len({str(fault) for _, fault in list(proxy.requests)}) > 4, "five kinds of faults", 120)
    proxy.heal()
    assert run.finish(timeout_s=300) == ""
    check_all(reader(server), run, folder, 300, 4)


def test_very_many_metrics_of_a_job_whose_server_was_killed_arrive(
    server: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    run = tracking.open_run(config(proxy, "many"), name="job", folder=tmp_path / "run")
    server.kill()
    run.log_metrics({f"layer.{number}/norm": number / 7 for number in range(3500)}, 1)
    for step in range(1, 5001):
        run.log_metrics({"train/loss": 1 / step}, step)
    notice = run.finish(timeout_s=1)
    assert int(notice.split()[0]) > 5000
    assert f"lorot sync {tmp_path / 'run'}" in notice
    server.start()
    api = reader(server)
    assert recovery.sync(tmp_path / "run").sent > 5000
    data = api.get_run(run.run_id).data
    assert len(data.metrics) == 3501
    assert data.metrics["layer.3499/norm"] == 3499 / 7
    history = api.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 5001)]


def test_texts_that_a_database_cannot_hold_do_not_stop_the_records_behind_them(
    server: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    run = tracking.open_run(config(proxy, "texts"), name="job", folder=tmp_path / "run")
    run.log_params({"nul": "a\x00b", "surrogate": "caf\udce9", "fine": "é"})
    run.set_tags({"nul": "a\x00b"})
    run.log_metrics({"loss": 1.0}, 1)
    assert run.finish(timeout_s=60) == ""
    data = reader(server).get_run(run.run_id).data
    assert data.params == {"nul": "a�b", "surrogate": "caf?", "fine": "é"}
    assert data.metrics == {"loss": 1.0}


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
class TestWhateverTheDatabase:
    """What the database has no part in."""

    def test_a_record_that_is_refused_is_left_out_and_its_neighbours_arrive(
        self, server: Server, proxy: FaultProxy, tmp_path: Path
    ) -> None:
        run = tracking.open_run(config(proxy, "refused"), name="job", folder=tmp_path / "run")
        proxy.plan = lambda request: Fault(status=400, text=NO_SUCH) if b"poison" in request.body else PASS
        for step in range(1, 101):
            run.log_metrics({"poison" if step == 50 else "loss": float(step)}, step)
        assert run.finish(timeout_s=60) == ""
        history = reader(server).get_metric_history(run.run_id, "loss")
        assert [point.step for point in history] == [step for step in range(1, 101) if step != 50]

    @pytest.mark.parametrize("text", [NO_SUCH, "<html>Bad Request</html>"])
    def test_a_gateway_that_refuses_everything_makes_records_wait_and_not_vanish(
        self, server: Server, proxy: FaultProxy, tmp_path: Path, text: str
    ) -> None:
        run = tracking.open_run(config(proxy, f"gateway {len(text)}"), name="job", folder=tmp_path / "run")
        assert run.settle(60)
        proxy.plan = lambda request: Fault(status=400, text=text)
        for step in range(1, 101):
            run.log_metrics({"loss": float(step)}, step)
        assert not run.settle(1)
        assert run.unsent() == 100
        proxy.heal()
        assert run.finish(timeout_s=60) == ""
        history = reader(server).get_metric_history(run.run_id, "loss")
        assert [point.step for point in history] == list(range(1, 101))

    def test_a_run_that_was_deleted_keeps_its_records_until_it_is_restored(
        self, server: Server, proxy: FaultProxy, tmp_path: Path
    ) -> None:
        api = reader(server)
        run = tracking.open_run(config(proxy, "deleted"), name="job", folder=tmp_path / "run")
        assert run.settle(60)
        api.delete_run(run.run_id)
        run.log_metrics({"loss": 1.0}, 1)
        await_(lambda: "runs restore" in run._sender.last_error, "the run says why its records wait", 60)
        assert run.unsent() == 1
        api.restore_run(run.run_id)
        assert run.finish(timeout_s=60) == ""
        assert [point.value for point in api.get_metric_history(run.run_id, "loss")] == [1.0]

    def test_a_server_that_asks_for_a_pause_gets_it(self, server: Server, proxy: FaultProxy, tmp_path: Path) -> None:
        run = tracking.open_run(config(proxy, "pause"), name="job", folder=tmp_path / "run")
        assert run.settle(60)
        proxy.requests.clear()
        proxy.plan = lambda request: Fault(status=429, headers={"Retry-After": "4"}, text="slow down")
        run.log_metrics({"loss": 1.0}, 1)
        # One attempt, and one question for how long.
        await_(lambda: len(proxy.requests) >= 2, "the server is asked how long to pause", 60)
        proxy.heal()
        assert run.finish(timeout_s=60) == ""
        times = [request.time_s for request, _ in proxy.requests]
        assert times[2] - times[1] > 3.5

    @pytest.mark.parametrize("fault", [HANG, RESET, BUSY, Fault(delay_s=3)], ids=["hang", "reset", "503", "slow"])
    def test_a_job_writes_as_if_the_server_were_well_and_all_arrives_later(
        self, server: Server, proxy: FaultProxy, tmp_path: Path, fault: Fault
    ) -> None:
        run = tracking.open_run(config(proxy, str(fault)[:60]), name="job", folder=tmp_path / "run")
        assert run.settle(60)
        proxy.plan = lambda request: fault
        proxy.requests.clear()
        for step in range(1, 2001):
            run.log_metrics({"loss": float(step)}, step)
        # None of the writes has waited for an answer: there were hardly any questions.
        assert len(proxy.requests) < 200
        assert run.finish(timeout_s=1) != ""
        proxy.heal()
        deadline = time.monotonic() + 120
        while run._sender._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        run._spool.close()
        api = reader(server)
        recovery.sync(tmp_path / "run")
        history = api.get_metric_history(run.run_id, "loss")
        assert [point.step for point in history] == list(range(1, 2001))
        assert api.get_run(run.run_id).info.status == "FINISHED"

    def test_a_job_whose_server_dies_ends_well_and_its_model_is_registered_later(
        self, server: Server, proxy: FaultProxy, tmp_path: Path
    ) -> None:
        job = write_config(tmp_path, proxy.uri, steps=40)
        api = reader(server)
        # From the moment on that the run is known: the job has no time to be faster than the fault.
        proxy.plan = lambda request: RESET if (job.path / "run.json").exists() else PASS
        training = lorot(tmp_path, "train", str(tmp_path / "job.yaml"))
        assert training.wait(300) == 0, (tmp_path / "said.txt").read_text()
        assert "is not registered yet" in (tmp_path / "said.txt").read_text()
        assert job.read("summary.json")["model_version"] is None
        # Nothing is sent while nobody answers.
        assert lorot(tmp_path, "sync", str(job.path)).wait(120) == 6
        proxy.heal()
        assert lorot(tmp_path, "sync", str(tmp_path / "runs")).wait(120) == 0
        found = api.get_run(job.read("run.json")["run_id"])
        assert found.info.status == "FINISHED"
        (version,) = api.search_model_versions("name='small'")
        assert (version.run_id, int(version.version)) == (found.info.run_id, job.read("summary.json")["model_version"])
        assert registry.resolve("models:/small@best", server.uri).run_id == found.info.run_id
        history = api.get_metric_history(found.info.run_id, "train/loss")
        expected = [(line["step"], line["train/loss"]) for line in lines_of(job) if "train/loss" in line]
        assert [(point.step, point.value) for point in history] == expected
        files = {item.path for item in api.list_artifacts(found.info.run_id)}
        assert files >= {"config.yaml", "summary.json", "report.html", "model"}
        assert f"small, version {version.version}" in (job.path / "report.html").read_text()
