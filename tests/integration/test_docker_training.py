"""Two nodes train in containers of a real Docker engine, from a submission on, whatever is lost or killed."""

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import store
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.record import Record
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.integration import engine as engines
from tests.integration import sample_logs
from tests.integration.engine import Engine
from tests.integration.processes import await_
from tests.integration.record_server import PostgreSQL, Server
from tests.integration.service_process import draw_demo
from tests.soak import checks

pytestmark = pytest.mark.integration

# Of a training that comes to its end: many more than it makes until its record has been killed.
STEPS, LOG_EVERY = 800, 4
# Of the demo set, and of a step.
SAMPLES, BATCH = 64, 16


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


def config(data: Path, **changed: Any) -> dict[str, Any]:
    return {
        "duration": "1000 epochs",
        "evaluate_every": "1000 epochs",
        "global_batch": BATCH,
        "micro_batch": 8,
        "device": "cpu",
        "data": {
            "name": "demo",
            "root": str(data / "demo"),
            "size": 32,
            "loader": "torch",
            "options": {"train_count": SAMPLES, "val_count": 16, "size": 40},
        },
        "model": {"name": "resnet_small", "width": 8},
        "checkpoint": {"every": "8 steps"},
        "log_samples": True,
        "tracking": {"log_every": f"{LOG_EVERY} steps", "system_metrics": False},
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


def test_two_nodes_train_lose_one_go_on_and_when_all_are_lost_the_next_attempt_goes_on(
    engine: Engine, record: str, data: Path, settings: ServiceSettings
) -> None:
    """On the network of the operator's that docker/service.yaml has, beside which the nodes have their own."""
    api, shared = engine.client.api, f"lorot-test-{secrets.token_hex(4)}"
    api.create_network(shared)
    docker = settings.backends.docker.model_copy(update={"network": shared})
    backends = settings.backends.model_copy(update={"docker": docker})
    desk = Desk(settings.model_copy(update={"backends": backends}))
    controller = Controller(desk)
    controller.start()
    try:
        job, _ = desk.submit(JobSpec.model_validate(spec(data, nodes="1:2", retries=1)))
        run = settings.results / job.id / "run"

        def log() -> str:
            return b"".join(desk.logs(job.id)).decode()

        def told() -> str:
            now = desk.get(job.id)
            logs = [path.read_text(errors="replace")[-2500:] for path in sorted(run.glob("*log*.txt"))]
            return "\n---\n".join(
                [f"{now}\n{controller.problems}", b"".join(desk.logs(job.id)).decode()[-3000:], *logs]
            )

        def steps(rank: int) -> int:
            assert not desk.get(job.id).has_ended, told()
            return len(sample_logs.lines_of(run, rank))

        def is_resumed() -> bool:
            assert not desk.get(job.id).has_ended, told()
            return "going on from step" in log()

        def attempt() -> str:
            return desk.get(job.id).attempts[-1].name

        def node(number: int) -> Any:
            return api.inspect_container(f"{attempt()}-n{number}")

        await_(lambda: steps(1) > 8 and any(run.glob("checkpoints/step-*")), "both nodes train", 300, told)
        assert set(node(0)["NetworkSettings"]["Networks"]) == {attempt(), shared}
        assert api.inspect_network(attempt())["Internal"] is True
        api.kill(f"{attempt()}-n1")
        before = steps(0)
        await_(lambda: steps(0) > before + 5, "the one that is left goes on", 300, told)
        assert (desk.get(job.id).state, len(desk.get(job.id).attempts)) == ("running", 1)
        assert node(1)["State"]["Running"] is False

        first = attempt()
        # As somebody would who clears up the engine: nothing is left to say how it ended.
        for name in (f"{first}-n0", f"{first}-n1"):
            api.remove_container(name, force=True)
        await_(lambda: attempt() != first, "there is a second attempt", 120, told)
        await_(is_resumed, "it goes on", 300, told)
        began = re.findall(r"going on from step (\d+)", log())
        assert int(began[0]) >= 8
        await_(lambda: node(0)["State"]["Running"] and node(1)["State"]["Running"], "both nodes are there", 120, told)
        desk.cancel(job.id)
        await_(lambda: desk.get(job.id).has_ended, "it is cancelled", 120, told)
        assert [one.exit_code for one in desk.get(job.id).attempts] == [None, 75]
        assert {path.name for path in (settings.results / job.id / "attempts/2").glob("log-node*")} == {
            "log-node0.txt",
            "log-node1.txt",
        }
        await_(lambda: not desk.backend("docker").reconcile(), "its containers are removed", 60, told)
    finally:
        controller.stop()
        engine.remove_jobs()
        api.remove_network(shared)


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    made = PostgreSQL()
    yield made
    made.stop()


def test_two_nodes_become_one_registered_model_whenever_the_record_is_killed_under_them(
    engine: Engine, postgresql: PostgreSQL, data: Path, settings: ServiceSettings, tmp_path: Path
) -> None:
    server = Server(tmp_path, postgresql.database("record"), host=engine.gateway)
    server.start()
    desk = Desk(settings.model_copy(update={"tracking_uri": server.uri}))
    controller = Controller(desk)
    controller.start()
    try:
        short = config(data, duration=f"{STEPS} steps", evaluate_every=f"{STEPS} steps")
        job, _ = desk.submit(JobSpec.model_validate(spec(data, nodes="2", config=short)))
        folder = settings.results / job.id
        run = folder / "run"

        def told() -> str:
            logs = [path.read_text(errors="replace")[-2500:] for path in sorted(folder.rglob("*log*.txt"))]
            return "\n---\n".join([f"{desk.get(job.id)}\n{controller.problems}", *logs])

        def steps() -> int:
            return min(len(sample_logs.lines_of(run, rank)) for rank in (0, 1))

        def await_steps(num: int, what: str) -> None:
            before = steps()
            await_(lambda: steps() >= before + num, what, 300, told)

        def start_and_kill_both_while_it_writes(table: str, what: str) -> None:
            postgresql.start()
            with postgresql.holding("record", table) as is_awaited:
                server.start()
                await_(is_awaited, what, 300, told)
                postgresql.kill()
                server.kill()

        await_steps(8, "both nodes train")
        postgresql.kill()
        await_steps(8, "they go on without PostgreSQL")
        server.kill()
        await_steps(8, "they go on without MLflow and PostgreSQL")
        assert steps() < STEPS
        start_and_kill_both_while_it_writes("metrics", "what was recorded meanwhile is sent")
        start_and_kill_both_while_it_writes("model_versions", "the model is registered")
        # The version is there by then, and nobody has been told of it.
        start_and_kill_both_while_it_writes("registered_model_aliases", "the version becomes the best one")
        postgresql.start()
        server.start()

        await_(lambda: desk.get(job.id).has_ended, "the job ends", 300, told)
        ended = desk.get(job.id)
        assert (ended.state, ended.reason, ended.failures) == ("finished", "", 0), told()
        (attempt,) = ended.attempts
        assert attempt.exit_code == 0
        assert attempt.image_digest.startswith("sha256:")
        (whole,) = sample_logs.attempts(run)
        assert (whole.first, whole.last) == (1, STEPS)
        assert checks.samples(sample_logs.order(run), SAMPLES, BATCH) == []
        assert checks.tracked(server.uri, STEPS, run, LOG_EVERY, "tiny") == []
        assert store.client(server.uri).get_model_version_by_alias("docker-small", "best").run_id == job.id
        assert run.stat().st_uid == 1000
        assert (folder / "attempts/1/log-node0.txt").is_file()
        # It is cleared away after its end has been recorded.
        docker = desk.backend("docker")
        await_(lambda: attempt.name not in docker.reconcile(), "its containers are removed", 60, told)
    finally:
        controller.stop()
        server.kill()
        engine.remove_jobs()


class Service:
    """The controller of jobs as a process of its own, which is killed as a service would be."""

    def __init__(self, settings: ServiceSettings, folder: Path) -> None:
        self._file, self._log = folder / "service.yaml", folder / "service.log"
        self._file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        line = [sys.executable, "-m", "tests.integration.job_controller", str(self._file)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(line, cwd=engines.ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def said(self) -> str:
        """Since its last start."""
        return self._log.read_text(errors="replace")


def test_two_nodes_outlive_the_engine_and_the_service_and_where_the_engine_takes_them_along_the_next_attempt_goes_on(
    engine: Engine, record: str, data: Path, settings: ServiceSettings, tmp_path: Path
) -> None:
    engines.skip_unless_own(engine)
    service = Service(settings, tmp_path)
    job, _ = Desk(settings).submit(JobSpec.model_validate(spec(data, nodes="2", retries=1, grace_s=30)))
    run, api = settings.results / job.id / "run", engine.client.api

    def now() -> Job:
        """As another process has recorded it."""
        return Record(settings).get(job.id)

    def told() -> str:
        logs = [path.read_text(errors="replace")[-2500:] for path in sorted(run.parent.rglob("*log*.txt"))]
        return "\n---\n".join([str(now()), service.said()[-4000:], str(sample_logs.attempts(run)), *logs])

    def steps(rank: int) -> int:
        return len(sample_logs.lines_of(run, rank))

    def await_steps(what: str) -> None:
        """Each of the nodes makes some more."""
        before = [steps(rank) for rank in (0, 1)]
        await_(lambda: all(steps(rank) > before[rank] + 3 for rank in (0, 1)), what, 120, told)

    def parts(attempt: int) -> dict[str, tuple[str, str]]:
        """The containers of an attempt that run: of each its id, and when it was started."""
        prefix = f"lorot-{job.id[:12]}-{attempt}-"
        found = [api.inspect_container(one["Id"]) for one in api.containers(filters={"label": f"lorot.job={job.id}"})]
        named = {one["Name"].removeprefix("/"): (one["Id"], one["State"]["StartedAt"]) for one in found}
        return {name.removeprefix(prefix): one for name, one in named.items() if name.startswith(prefix)}

    def networks() -> dict[str, str]:
        return {one["Name"]: one["Id"] for one in api.networks(filters={"label": f"lorot.job={job.id}"})}

    try:
        service.start()
        await_(lambda: steps(1) > 8 and sample_logs.newest_checkpoint(run), "both nodes train", 300, told)
        whole, way = parts(1), networks()
        assert (set(whole), list(way)) == ({"n0", "n1", "rdzv"}, [now().attempts[0].name])
        service.kill()
        engine.kill()
        await_steps("they go on without the engine")
        service.start()
        await_(lambda: "does not answer" in service.said(), "the new service misses the engine", 60, told)
        engine.start()
        await_(lambda: "docker answers again" in service.said(), "the service has found the engine", 60, told)
        await_steps("they go on with the new engine")
        assert (parts(1), networks()) == (whole, way)
        assert len(sample_logs.attempts(run)) == 1, "the workers were started again"
        adopted = now()
        assert (adopted.state, len(adopted.attempts), adopted.failures) == ("running", 1, 0)

        kept = sample_logs.newest_checkpoint(run)
        with engines.without_live_restore(engine):
            await_(lambda: len(sample_logs.attempts(run)) > 1, "the next attempt trains", 300, told)
            again, way_again = parts(2), networks()
            assert set(again) == {"n0", "n1", "rdzv"}, told()
            assert not {one for one, _ in again.values()} & {one for one, _ in whole.values()}
            assert parts(1) == {}
            assert set(way_again) == {now().attempts[1].name}
            await_steps("they go on")
            service.kill()
            desk = Desk(settings)
            controller = Controller(desk)
            controller.start()
            try:
                desk.cancel(job.id)
                await_(lambda: desk.get(job.id).has_ended, "it is cancelled", 120, told)
                await_(lambda: not parts(2) and not networks(), "nothing is left of it", 60, told)
            finally:
                controller.stop()
    finally:
        service.kill()
    ended = now()
    # The engine may have asked them to stop, and then they have saved.
    lost, cancelled = (one.exit_code for one in ended.attempts)
    assert (ended.state, lost != 0, cancelled) == ("killed", True, 75)
    first, second = sample_logs.attempts(run)
    assert kept < second.first <= first.last + 1
    assert checks.samples(sample_logs.order(run), SAMPLES, BATCH) == []
