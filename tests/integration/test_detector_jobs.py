"""`lorot detect` and `lorot segment` as jobs of the service: to their scores, at the version that they are about."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from pipelines.drawing import coco_export
from service import registry, store, tracking
from service.config import TrackingConfig
from tests.integration import docker_service
from tests.integration import engine as engines
from tests.integration.processes import await_
from tests.integration.service_process import Service, let_all_read, lorot
from tests.integration.small_detectors import RETINANET, SOLOV2
from tests.service import small_model

pytestmark = pytest.mark.integration

# So many that a busy machine can still stop it before its end.
STEPS = 120
COMMON = """
evaluate_every: {steps} steps
duration: {steps} steps
global_batch: 4
micro_batch: 2
workers: 1
device: cpu
precision: fp32
schedule: {{warmup: 2 steps, milestones: [3 steps]}}
checkpoint: {{every: 2 steps}}
tracking: {{log_every: 2 steps, system_metrics: false}}
data: {{root: "{root}/data/scenes", short_sides: [64], long_side: 96, loader: torch}}
"""
DETECT = f"job: detect\n{RETINANET}"
SEGMENT = f"job: segment\n{SOLOV2}"


# What a spec says of where it runs.
PLACES: Mapping[str, dict[str, Any]] = {
    "local": {},
    "docker": {"backend": "docker", "nodes": "2", "mounts": engines.mounts(), "resources": docker_service.LIMITS},
}
# What the backend has no part in is tested with one.
local = pytest.mark.parametrize("backend", ["local"], indirect=True)


@pytest.fixture(scope="module", params=PLACES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def service(
    backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """With this backend, drawn scenes, and a small classifier that is registered as models:/small@best."""
    folder = tmp_path_factory.mktemp(backend)
    with contextlib.ExitStack() as ending:
        if backend == "docker":
            made = ending.enter_context(docker_service.prepared(request.getfixturevalue("engine"), folder))
        else:
            made = Service(folder, cpus=2, gpus=0, limits={"requests_per_minute": 10**6})
            ending.callback(made.close)
        scenes = coco_export.Scenes(train_count=12, val_count=4, size=96, classes=3, most=3)
        coco_export.export(folder / "data" / "scenes", scenes)
        let_all_read(folder / "data" / "scenes")
        tracked = TrackingConfig(uri=made.uri, system_metrics=False)
        run = tracking.open_run(tracked, name="small", folder=folder / "small")
        run.finish()
        model = small_model.written(folder / "small" / "model")
        registry.register(model, name="small", run_id=run.run_id, metric="val/top1", tracking_uri=made.uri)
        made.start()
        yield made


def detection(service: Service, backend: str, model: str = "models:/small@best") -> dict[str, Any]:
    config = yaml.safe_load(COMMON.format(root=service.folder, steps=STEPS) + DETECT)
    # With a key, so that a request that is sent again makes no second job.
    key = model.replace(":", "").replace("/", "-").replace("@", "-")
    return {
        "spec": {"kind": "detect", "name": "boxes", "model": model, "config": config, **PLACES[backend]},
        "key": key,
    }


def shown(service: Service, job: str) -> dict[str, Any]:
    found: dict[str, Any] = service.ask("GET", f"/v1/jobs/{job}")
    return found


def log(service: Service, job: str, attempt: int) -> str:
    path = service.folder / "jobs" / job / "attempts" / str(attempt) / "log-node0.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def await_end(service: Service, job: str) -> dict[str, Any]:
    def told() -> str:
        now = shown(service, job)
        return f"{now}\n{log(service, job, len(now['attempts']))[-4000:]}"

    await_(lambda: shown(service, job)["state"] in ("finished", "failed", "killed"), f"job {job} ends", 240, told)
    return shown(service, job)


def test_a_detector_is_cancelled_resumed_and_scored_at_the_version_that_it_is_about(
    service: Service, backend: str
) -> None:
    job = service.ask("POST", "/v1/jobs", detection(service, backend))["id"]
    checkpoints = service.folder / "jobs" / job / "run" / "checkpoints"
    await_(lambda: any(checkpoints.glob("step-*[0-9]")), "a checkpoint", 120, lambda: log(service, job, 1))
    service.ask("POST", f"/v1/jobs/{job}/cancel")
    stopped = await_end(service, job)
    assert (stopped["state"], stopped["reason"]) == ("killed", "cancelled")
    assert [attempt["exit_code"] for attempt in stopped["attempts"]] == [75]
    service.ask("POST", f"/v1/jobs/{job}/resume")
    ended = await_end(service, job)
    assert (ended["state"], ended["reason"]) == ("finished", "")
    assert [attempt["exit_code"] for attempt in ended["attempts"]] == [75, 0]
    assert "going on from step" in log(service, job, 2)

    result = json.loads((service.folder / "jobs" / job / "run" / "detect.json").read_text())
    average = result["scores"]["AP"]
    assert 0 <= average <= result["scores"]["AP50"] <= 1
    assert (result["model_uri"], result["record_id"]) == ("models:/small/1", job)
    api = store.client(service.uri)
    # One run, which both attempts wrote to, below that of the model.
    run = api.get_run(job)
    assert len(api.search_runs([run.info.experiment_id], "tags.job = 'detect'")) == 1
    assert (run.info.status, run.data.metrics["val/AP"], run.data.metrics["detect/AP"]) == (
        "FINISHED",
        average,
        average,
    )
    version = api.get_model_version("small", "1")
    assert (run.data.tags["model.uri"], run.data.tags["mlflow.parentRunId"]) == ("models:/small/1", version.run_id)
    steps = [point.step for point in api.get_metric_history(job, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert version.tags["downstream.detect.run_id"] == job
    assert float(version.tags["downstream.detect.AP"]) == average
    # The service says the same.
    metrics = service.ask("GET", f"/v1/jobs/{job}/metrics")["metrics"]
    assert [record["val/AP"] for record in metrics if "val/AP" in record] == [average]
    listed = service.ask("GET", "/v1/models/small/1")
    assert listed["downstream"]["detect.AP"] == average
    files = {one["name"] for one in service.ask("GET", f"/v1/jobs/{job}/files")["files"]}
    assert {"job.yaml", "config.yaml", "detect.json"} <= files


def test_masks_are_handed_in_by_the_command_and_waited_for(service: Service, backend: str) -> None:
    file = service.folder / "masks.yaml"
    file.write_text(COMMON.format(root=service.folder, steps=4) + SEGMENT)
    options = ["--model", "models:/small/1", "--backend", backend]
    if backend == "docker":
        options += [part for place in engines.mounts() for part in ("--mount", place)]
        options += [part for name, value in docker_service.LIMITS.items() for part in (f"--{name}", value)]
    done = lorot(service.folder, "submit", str(file), *options, "--server", service.url, "--wait", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout)
    assert (job["kind"], job["name"], job["state"]) == ("segment", "masks", "finished")
    tags = store.client(service.uri).get_model_version("small", "1").tags
    assert tags["downstream.segment.run_id"] == job["id"]
    assert 0 <= float(tags["downstream.segment.AP"]) <= 1


@local
def test_a_model_that_is_not_there_ends_the_job_at_once_with_those_that_are(service: Service) -> None:
    job = service.ask("POST", "/v1/jobs", detection(service, "local", "models:/small@bset"))["id"]
    failed = await_end(service, job)
    assert failed["state"] == "failed"
    assert [attempt["exit_code"] for attempt in failed["attempts"]] == [5]
    assert "aliases: best, latest; versions: 1" in failed["reason"]
