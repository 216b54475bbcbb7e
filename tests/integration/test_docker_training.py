"""Training in containers of a real Docker engine: one node, two that meet, and the whole way from a submission."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import store
from service.jobs.backends import Order
from service.jobs.backends.docker import DockerBackend
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.integration import engine as engines
from tests.integration.engine import Engine
from tests.integration.processes import await_
from tests.integration.record_server import Server
from tests.integration.service_process import draw_demo

pytestmark = pytest.mark.integration

STEPS = 24


@pytest.fixture(scope="module")
def record(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server where containers and this machine both reach it: the engine's own address on its bridge."""
    server = Server(tmp_path_factory.mktemp("record"), host=engine.gateway)
    try:
        server.start()
        yield server.uri
    finally:
        server.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the demo set."""
    root = tmp_path_factory.mktemp("data")
    draw_demo(root / "demo")
    return root


@pytest.fixture
def settings(engine: Engine, record: str, data: Path, tmp_path: Path) -> ServiceSettings:
    made = engines.settings(engine, tmp_path)
    return made.model_copy(update={"data_roots": (data,), "tracking_uri": record})


def steps_done(folder: Path) -> int:
    """By the last line of its metrics; 0 unless it reached its end."""
    if not (folder / "run/summary.json").exists():
        return 0
    return int(json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])["step"])


def config(data: Path, **changed: Any) -> dict[str, Any]:
    return {
        "duration": f"{STEPS} steps",
        "evaluate_every": f"{STEPS} steps",
        "global_batch": 16,
        "micro_batch": 8,
        "device": "cpu",
        "data": {
            "name": "demo",
            "root": str(data / "demo"),
            "size": 32,
            "loader": "torch",
            "options": {"train_count": 64, "val_count": 16, "size": 40},
        },
        "model": {"name": "resnet_small", "width": 8},
        "checkpoint": {"every": "8 steps"},
        "tracking": {"log_every": "4 steps", "system_metrics": False},
        "registry": {"name": "docker-small"},
        **changed,
    }


def spec(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "backend": "docker",
        "config": config(data),
        "mounts": engines.mounts(),
        "resources": {"cpus": 1, "memory": "4GiB", "shm": "512MiB"},
        "workers": 1,
        **more,
    }


def test_two_nodes_meet_train_and_reach_the_end(record: str, data: Path, settings: ServiceSettings) -> None:
    run = secrets.token_hex(16)
    job = Job(run, "1", JobSpec.model_validate(spec(data, nodes="1:2")), "starting")
    name, folder = f"lorot-{run[:12]}-1", settings.results / run
    folder.mkdir()
    values = config(data, name="run", output="/job")
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    command = ["lorot", "train", "/job/job.yaml", "--workers", "1", "--max-restarts", "3"]
    # The second may be late on a busy machine: the first is to wait for it, and not to be done alone.
    command += ["--nnodes", "2:2", "--rdzv", "{rendezvous}", "--run-id", name]
    backend = DockerBackend(settings)
    variables = {"MLFLOW_TRACKING_URI": record}
    backend.start(Order(name, job, folder, tuple(command), variables))

    def told() -> str:
        logs = [b"".join(backend.logs(name, {}, node=node)).decode()[-3000:] for node in (0, 1)]
        rest = [path.read_text(errors="replace")[-2000:] for path in sorted((folder / "run").glob("*.log"))]
        return "\n---\n".join([str(backend.status(name, {})), *logs, *rest])

    try:
        await_(lambda: backend.status(name, {}).phase == "ended", "both nodes end", 480, told)
        assert backend.status(name, {}).exit_code == 0, told()
        assert steps_done(folder) == STEPS
        # Each machine's torchrun has its own address, and each had a worker in the last round.
        assert len(list((folder / "run").glob("torchrun-*.log"))) == 2
        assert {path.name for path in (folder / "run").glob("log-rank*.txt")} == {"log-rank0.txt", "log-rank1.txt"}
    finally:
        backend.remove(name, {})
        backend.close()
    assert {path.name for path in (folder / "attempts/1").iterdir()} == {
        "exit.json",
        "log-node0.txt",
        "log-node1.txt",
    }


def test_a_submitted_job_ends_as_a_registered_model(record: str, data: Path, settings: ServiceSettings) -> None:
    desk = Desk(settings)
    controller = Controller(desk)
    controller.start()
    try:
        job, is_new = desk.submit(JobSpec.model_validate(spec(data)))
        assert is_new

        def told() -> str:
            now = desk.get(job.id)
            return f"{now}\n{controller.problems}\n" + b"".join(desk.logs(job.id)).decode()[-4000:]

        await_(lambda: desk.get(job.id).has_ended, "the job ends", 480, told)
        ended = desk.get(job.id)
        assert (ended.state, ended.reason) == ("finished", ""), told()
        (attempt,) = ended.attempts
        assert attempt.exit_code == 0
        assert attempt.image_digest.startswith("sha256:")
        client = store.client(record)
        assert client.get_run(job.id).info.status == "FINISHED"
        versions = client.search_model_versions("name='docker-small'")
        assert job.id in {version.run_id for version in versions}
        folder = settings.results / job.id
        assert steps_done(folder) == STEPS
        assert (folder / "run").stat().st_uid == 1000
        assert (folder / "attempts/1/log-node0.txt").is_file()
        # It is cleared away after its end has been recorded.
        docker = desk.backend("docker")
        await_(lambda: attempt.name not in docker.reconcile(), "its container is removed", 60, told)
    finally:
        controller.stop()
