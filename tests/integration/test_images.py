"""The images of docker/Dockerfile, built for real on a base from debootstrap, and docker/compose.yaml's use of them."""

import json
import os
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import composition
from tests.integration.debian import RefusedError
from tests.integration.engine import ROOT, Engine
from tests.integration.service_process import CONFIG

pytestmark = pytest.mark.integration

# The file lies beside no package: `docker` is the engine's client.
name_of = runpy.run_path(str(ROOT / "docker/requirements.py"))["name_of"]
SERVICE_BYTES, BACKUP_BYTES, WORKER_BYTES = 1_100_000_000, 1_300_000_000, 8_000_000_000


@pytest.fixture(scope="module")
def service(engine: Engine) -> str:
    """The service's image."""
    return composition.build(engine, "service", composition.checkout())


@pytest.fixture(scope="module")
def backup(engine: Engine) -> str:
    """The image that backups are made in."""
    return composition.build(engine, "backup", composition.checkout())


def run(engine: Engine, image: str, *command: str, **options: Any) -> tuple[int, str]:
    """The exit code, and what it said."""
    client = engine.client
    made = client.containers.create(image, list(command), read_only=True, cap_drop=["ALL"], **options)
    try:
        made.start()
        code = made.wait(timeout=600)["StatusCode"]
        return int(code), made.logs().decode()
    finally:
        made.remove(force=True)


def test_the_services_image_has_its_commands_and_no_torch(engine: Engine, service: str) -> None:
    for command in (["serve", "--help"], ["jobs", "--help"], ["submit", "--help"], ["rendezvous", "--help"]):
        code, said = run(engine, service, *command)
        assert code == 0, said
        assert "Usage" in said
    program = """
import importlib.util, json, os
absent = ("torch", "deepspeed", "scipy", "numba", "nvidia", "pip", "sqlalchemy")
print(json.dumps([[name for name in absent if importlib.util.find_spec(name)], os.getuid()]))
"""
    code, said = run(engine, service, "-c", program, entrypoint="python")
    assert (code, json.loads(said)) == (0, [[], 1000])
    assert engine.size_bytes(service) < SERVICE_BYTES
    configuration = engine.client.api.inspect_image(service)["Config"]
    assert configuration["User"] == "1000:1000"
    assert "healthz" in str(configuration["Healthcheck"]["Test"])


def test_everything_that_the_service_imports_is_in_its_image(engine: Engine, service: str) -> None:
    program = """
import importlib, pkgutil, sys, tempfile
import service.api, service.check, service.console, service.jobs, service.operations
for package in (service.api, service.check, service.console, service.jobs, service.operations):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
from service import cli, client, config, lineage, registry, store, tracking
store.client("http://127.0.0.1:9").tracking_uri
print("all there", [name for name in ("torch", "deepspeed", "numba") if name in sys.modules])
"""
    code, said = run(engine, service, "-c", program, entrypoint="python", tmpfs={"/tmp": ""})
    assert code == 0, said
    assert "all there []" in said


def test_the_backups_image_has_what_a_database_and_a_store_are_asked_with(engine: Engine, backup: str) -> None:
    for command in (["backup", "--help"], ["restore", "--help"]):
        code, said = run(engine, backup, *command)
        assert code == 0, said
    program = """
import importlib.util, json, os, subprocess
from service.operations import backup, objects, restore
needed = ("sqlalchemy", "psycopg2", "boto3")
lines = [subprocess.run([name, "--version"], capture_output=True).returncode for name in ("pg_dump", "pg_restore")]
print(json.dumps([[name for name in needed if not importlib.util.find_spec(name)], lines, os.getuid()]))
"""
    code, said = run(engine, backup, "-c", program, entrypoint="python")
    assert (code, json.loads(said)) == (0, [[], [0, 0], 1000])
    assert engine.size_bytes(backup) < BACKUP_BYTES
    assert engine.client.api.inspect_image(backup)["Config"]["Healthcheck"]["Test"] == ["NONE"]


def test_the_workers_image_trains_read_only_as_nobody_special_and_without_a_network(
    engine: Engine, tmp_path: Path
) -> None:
    image = composition.build_worker(engine)
    configuration = engine.client.api.inspect_image(image)["Config"]
    assert (configuration["User"], configuration["Healthcheck"]["Test"]) == ("1000:1000", ["NONE"])
    assert engine.size_bytes(image) < WORKER_BYTES
    code, said = run(engine, image, "--help")
    assert (code, "Usage" in said) == (0, True), said
    # What torch.compile and DeepSpeed's operators take; nothing that installs.
    wanted = ("triton", "setuptools", "pip")
    program = f"import importlib.util; print([name for name in {wanted} if importlib.util.find_spec(name)])"
    assert run(engine, image, "-c", program, entrypoint="python") == (0, "['triton', 'setuptools']\n")
    assert run(engine, image, "--version", entrypoint="g++")[0] == 0
    confined = {
        "network_mode": "none",
        "tmpfs": {"/tmp": "exec"},
        "shm_size": "512m",
        "security_opt": ["no-new-privileges"],
        "environment": {"HOME": "/tmp", "OMP_NUM_THREADS": "1"},
        "volumes": {str(tmp_path): {"bind": "/work", "mode": "rw"}},
    }
    tmp_path.chmod(0o777)
    code, said = run(engine, image, "doctor", **confined)
    assert code == 0, said
    assert "Training works here" in said
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(steps=20, root="/work", model="small"))
    code, said = run(engine, image, "train", "tiny.yaml", "name=tiny", **confined)
    assert code == 0, said
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert (tmp_path / "runs/tiny").stat().st_uid == 1000


def test_what_an_image_installs_comes_from_the_project(engine: Engine) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {}
    for image in ("service", "backup", "record", "worker"):
        line = ["python3", "docker/requirements.py", "pyproject.toml", image]
        lines[image] = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(project["dependencies"]) <= set(lines["worker"])
    assert any(name_of(line).startswith("nvidia-dali") for line in lines["worker"])
    assert {name_of(line) for line in lines["service"]} >= {"fastapi", "docker", "kubernetes", "mlflow-skinny"}
    assert not {name_of(line) for line in lines["service"]} & {"torch", "deepspeed", "mlflow"}
    assert {name_of(line) for line in lines["backup"]} == {"sqlalchemy", "psycopg2-binary", "boto3"}
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for image, listed in lines.items():
        assert {name_of(line) for line in listed} <= pinned, image
    recipe = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", recipe)
    assert len(installs) == 6
    for line in installs:
        assert "-c /source/constraints.txt" in line or {"--no-deps", "--no-build-isolation"} <= set(line.split()), line


VALUES = {"POSTGRES_PASSWORD": "aaaa", "STORE_ACCESS_KEY": "bbbb", "STORE_SECRET_KEY": "cccc", "DOCKER_GID": "999"}


def composed() -> dict[str, Any]:
    """The file as it is where none of its variables with a default is set."""
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", (ROOT / "docker/compose.yaml").read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_the_composition_has_no_passwords_of_its_own_and_publishes_nothing_beyond_this_machine() -> None:
    text = (ROOT / "docker/compose.yaml").read_text()
    for name in VALUES:
        assert f"${{{name}:?" in text
        assert f"${{{name}:-" not in text
        assert f"${{{name}}}" not in text
    example = dict(
        line.split("=", 1)
        for line in (ROOT / "docker/example.env").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert example == dict.fromkeys(VALUES, "") | {"COMPOSE_PROJECT_NAME": "lorot"}
    for name, service in composed()["services"].items():
        assert service.get("security_opt") == ["no-new-privileges:true"], name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "privileged" not in service
        assert "network_mode" not in service


def test_the_composition_waits_for_what_is_healthy() -> None:
    services = composed()["services"]
    images = (ROOT / "docker/Dockerfile").read_text()
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services
            if how["condition"] == "service_healthy":
                target = services[other].get("build", {}).get("target")
                stage = images.partition(f" AS {target}\n")[2].partition("\nFROM ")[0] if target else ""
                assert "healthcheck" in services[other] or "HEALTHCHECK --interval" in stage, (name, other)
    assert services["postgres"]["networks"] == services["store"]["networks"] == ["record"]
    assert composed()["networks"]["record"]["internal"] is True


def test_the_compositions_settings_are_the_services(tmp_path: Path) -> None:
    from service.jobs import settings_file

    settings = settings_file.load(ROOT / "docker/service.yaml")
    services = composed()["services"]
    inside = {volume.split(":")[1] for volume in services["service"]["volumes"]}
    for folder in (settings.state, settings.results, settings.secrets, *settings.data_roots):
        assert str(folder) in inside
        assert f"{folder}:{folder}" in " ".join(services["service"]["volumes"])
    backup = services["backup"]
    assert f"{settings.state}:{settings.state}:ro" in backup["volumes"]
    assert backup["networks"] == services["postgres"]["networks"], "nobody else gets there"
    assert backup["profiles"] == ["backup"], "not started by `up`"
    assert settings.backends.docker.network == composed()["networks"]["jobs"]["name"]
    assert settings.tracking_uri == "http://mlflow:5000"
    assert settings.browser_tracking_uri == "http://localhost:5000"
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    allowed = services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {"mlflow:5000", "localhost:*"} <= set(allowed)


def test_compose_itself_accepts_it(tmp_path: Path) -> None:
    try:
        program = composition.program()
    except RefusedError as error:
        pytest.skip(str(error))
    line = [*program, "-f", str(ROOT / "docker/compose.yaml"), "config"]
    done = subprocess.run(line, env=os.environ | VALUES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # The newer one shows services of a profile only where that is asked for.
    assert set(yaml.safe_load(done.stdout)["services"]) | {"backup"} == set(composed()["services"])
    for name in VALUES:
        without = {key: value for key, value in VALUES.items() if key != name}
        done = subprocess.run(line, env=os.environ | without, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert name in done.stderr
