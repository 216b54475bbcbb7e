"""docker/compose.yaml's services together: a job runs there and its record stays; what a backup holds comes back."""

import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import engine as engines
from tests.integration.composition import Composition, program
from tests.integration.debian import RefusedError
from tests.integration.engine import ROOT, Engine
from tests.integration.processes import await_
from tests.integration.service_process import CONFIG, draw_demo, lorot

pytestmark = pytest.mark.integration

USER = 1000
# An archive's name in the guide.
EXAMPLE = "lorot-20261122-030000.tar"


@pytest.fixture(scope="module")
def engine(engine: Engine) -> Engine:
    try:
        program()
    except RefusedError as error:
        pytest.skip(f"no compose: {error}")
    return engine


@pytest.fixture(scope="module")
def composition(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """All services, up and ready, with a token."""
    folder = tmp_path_factory.mktemp("composition")
    made = Composition(engine, folder, shown=engines.mounts())
    make_folders(folder)
    draw_demo(folder / "data" / "demo")
    settings = yaml.safe_load((ROOT / "docker/service.yaml").read_text().replace("/srv/lorot", str(folder)))
    # Jobs run in the tests' own image, which takes its program from folders of this machine.
    settings["backends"]["docker"] |= {"image": engines.WORKER, "images": [engines.WORKER], "network": made.network}
    settings |= {"mounts": list(engines.mounts()), "poll_s": 0.5, "limits": {"requests_per_minute": 10**6}}
    (folder / "service.yaml").write_text(yaml.safe_dump(settings))
    made.make_images()
    try:
        made.token = re.search(r"lorot_\S+", made.follow("token", "create"))[0]  # type: ignore[index]
        up(made)
        yield made
    finally:
        made.down("--volumes")


def make_folders(folder: Path) -> None:
    """As docker/README.md says."""
    for name in ("state", "jobs", "data", "secrets", "backups"):
        (folder / name).mkdir(exist_ok=True)
        os.chown(folder / name, USER, USER)


def up(composition: Composition) -> None:
    composition.compose("up", "--detach", "--no-build", timeout_s=900)
    # At once, as who follows the guide does.
    composition.follow("curl", "-fs")
    assert composition.is_ready()


@pytest.fixture(scope="module")
def jobs(composition: Composition) -> dict[str, Any]:
    """A training, handed in by the command, and a container, handed in by curl; both at their end."""
    folder = composition.folder
    (folder / "tiny.yaml").write_text(CONFIG.format(steps=20, root=folder, model="composed"))
    shown = [word for place in engines.mounts() for word in ("--mount", place)]
    limits = ["--cpus", "1", "--memory", "4GB", "--shm", "512MB", "--workers", "1"]
    spec = '{"spec": {"kind": "container", "backend": "docker", "name": "plain", "outputs": ["answer"], '
    spec += '"command": ["sh", "-c", "echo 42 > /results/answer"]}, "key": "plain"}'
    heads = [f"Authorization: Bearer {composition.token}", "Content-Type: application/json"]
    line = ["curl", "-fsS", *(word for head in heads for word in ("-H", head)), "-d", spec]
    done = subprocess.run([*line, f"{composition.url}/v1/jobs"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder / "token").write_text(composition.token)
    service = ("--server", composition.url, "--token-file", str(folder / "token"))
    words = ("submit", str(folder / "tiny.yaml"), "--backend", "docker", *service, "--wait")
    done = lorot(folder, *words, *shown, *limits)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{composition.told()}"
    await_(lambda: all(job["state"] == "finished" for job in listed(composition)), "both end", 60, composition.told)
    return {job["name"]: job for job in listed(composition)}


def listed(composition: Composition) -> list[dict[str, Any]]:
    """All jobs, once the service has read those that have ended."""
    await_(lambda: not composition.ask("/v1/jobs")["partial"], "all jobs are read", 120, composition.told)
    found: list[dict[str, Any]] = composition.ask("/v1/jobs")["jobs"]
    return found


def test_a_job_runs_as_a_container_and_its_record_is_in_the_database_and_the_store(
    composition: Composition, jobs: dict[str, Any]
) -> None:
    assert {job["state"] for job in jobs.values()} == {"finished"}
    runs = composition.query("SELECT run_uuid, status FROM runs ORDER BY name")
    assert set(runs) == {f"{job['id']}|FINISHED" for job in jobs.values()}
    training, plain = jobs["tiny"]["id"], jobs["plain"]["id"]
    (model,) = composition.query("SELECT name, version, run_id FROM model_versions")
    assert model == f"composed|1|{training}"
    assert composition.query(f"SELECT count(*) FROM metrics WHERE run_uuid = '{training}'") != ["0"]
    objects = composition.objects()
    assert any(f"/{plain}/" in name and name.endswith("answer") for name in objects), objects
    assert any(training in name or "/models/" in name for name in objects), objects
    # It ran on the engine, as nobody special, and has left files there under the same names as inside.
    assert (composition.folder / "jobs" / training / "run").stat().st_uid == USER
    network = composition.engine.client.api.inspect_network(composition.network)
    assert network["Internal"] is False


def test_what_would_be_cleared_up_is_told_beside_the_running_service(
    composition: Composition, jobs: dict[str, Any]
) -> None:
    assert "nothing was removed" in composition.follow("gc", "--settings")
    assert composition.is_ready()


def test_down_and_up_again_keep_everything(composition: Composition, jobs: dict[str, Any]) -> None:
    tables, objects = tables_of(composition), composition.objects()
    composition.down()
    assert not composition.is_ready()
    up(composition)
    assert {job["name"]: job for job in listed(composition)} == jobs
    assert composition.objects() == objects
    assert tables_of(composition) == tables
    assert artifact(composition, jobs) == b"42\n"


def test_a_backup_made_beside_the_services_comes_back_where_everything_was_lost(
    composition: Composition, jobs: dict[str, Any]
) -> None:
    tables, objects = tables_of(composition), composition.objects()
    said = composition.follow("run", "--rm", "backup")
    assert "artifacts: s3://lorot" in said
    assert "not in it" not in said
    (made,) = (composition.folder / "backups").iterdir()
    assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (USER, 0o600)
    assert composition.is_ready(), "nothing had to be stopped"

    composition.down("--volumes")
    for name in ("state", "jobs"):
        shutil.rmtree(composition.folder / name)
    make_folders(composition.folder)
    restored = composition.follow("backup", "restore", changed={EXAMPLE: made.name})
    assert "all as they were written" in restored
    shutil.rmtree(composition.folder / "state")
    (composition.folder / "backups/restored/state").rename(composition.folder / "state")
    up(composition)
    assert composition.objects() == objects
    assert tables_of(composition) == tables
    assert {job["name"]: job["state"] for job in listed(composition)} == dict.fromkeys(jobs, "finished")
    assert artifact(composition, jobs) == b"42\n"
    # What is there already is not written over.
    with pytest.raises(AssertionError, match=r"holds .* already"):
        composition.follow("backup", "restore", changed={EXAMPLE: made.name, "restored": "again"})


def tables_of(composition: Composition) -> dict[str, list[str]]:
    """What the database holds of runs and models."""
    tables = (
        "experiments",
        "runs",
        "params",
        "metrics",
        "registered_models",
        "model_versions",
        "registered_model_aliases",
    )
    return {name: sorted(composition.query(f"SELECT * FROM {name}")) for name in tables}


def artifact(composition: Composition, jobs: dict[str, Any]) -> bytes:
    """What the container left, as MLflow hands it out."""
    plain = jobs["plain"]["id"]
    (place,) = (name for name in composition.objects() if f"/{plain}/" in name and name.endswith("answer"))
    address = f"http://127.0.0.1:{composition.record_port}/api/2.0/mlflow-artifacts/artifacts/{place}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return bytes(answer.read())
