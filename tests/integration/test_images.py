"""The images of docker/Dockerfile, built for real on a base from debootstrap, and docker/compose.yaml's use of them."""

import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import engine as engines
from tests.integration.engine import ROOT, Engine, RefusedError

pytestmark = pytest.mark.integration

# The file lies beside no package: `docker` is the engine's client.
name_of = runpy.run_path(str(ROOT / "docker/requirements.py"))["name_of"]
SERVICE = "lorot-test-service"
SIZES_BYTES = {SERVICE: 1_100_000_000}


@pytest.fixture(scope="module")
def engine() -> Engine:
    try:
        return engines.running()
    except RefusedError as error:
        pytest.skip(f"no Docker engine: {error}")


def context() -> dict[str, bytes]:
    """The files of the checkout that .dockerignore lets through."""
    folders = ("service", "pipelines", "configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")]
    files += [ROOT / "docker/Dockerfile", ROOT / "docker/requirements.py"]
    chosen = [path for path in files if "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in chosen}


@pytest.fixture(scope="module")
def service(engine: Engine) -> str:
    """The service's image."""
    if SERVICE not in engine.images:
        base = engine.load_base()
        arguments = {"dockerfile": "docker/Dockerfile", "target": "service", "buildargs": {"BASE_IMAGE": base}}
        engine.build(SERVICE, context(), **arguments)
        engine.images.add(SERVICE)
    return SERVICE


def run(engine: Engine, image: str, *command: str, **options: Any) -> tuple[int, str]:
    """The exit code, and what it said."""
    client = engine.client
    made = client.containers.create(image, list(command), read_only=True, cap_drop=["ALL"], **options)
    try:
        made.start()
        code = made.wait(timeout=120)["StatusCode"]
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
    assert engine.size_bytes(service) < SIZES_BYTES[service]
    configuration = engine.client.api.inspect_image(service)["Config"]
    assert configuration["User"] == "lorot"
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


def test_what_an_image_installs_comes_from_the_project(engine: Engine) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {}
    for image in ("service", "record", "worker"):
        line = ["python3", "docker/requirements.py", "pyproject.toml", image]
        lines[image] = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(project["dependencies"]) <= set(lines["worker"])
    assert any(name_of(line).startswith("nvidia-dali") for line in lines["worker"])
    assert {name_of(line) for line in lines["service"]} >= {"fastapi", "docker", "kubernetes", "mlflow-skinny"}
    assert not {name_of(line) for line in lines["service"]} & {"torch", "deepspeed", "mlflow"}
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for image, listed in lines.items():
        assert {name_of(line) for line in listed} <= pinned, image


VALUES = {"POSTGRES_PASSWORD": "aaaa", "STORE_ACCESS_KEY": "bbbb", "STORE_SECRET_KEY": "cccc", "DOCKER_GID": "999"}


def composed() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
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
    assert example == dict.fromkeys(VALUES, "")
    for service in composed()["services"].values():
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
    assert settings.backends.docker.network == composed()["networks"]["jobs"]["name"]
    assert settings.tracking_uri == "http://mlflow:5000"
    assert "mlflow:5000" in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_compose_itself_accepts_it(tmp_path: Path) -> None:
    program = next((line for line in (["docker", "compose"], ["docker-compose"]) if _works(line)), None)
    if program is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    line = [*program, "-f", str(ROOT / "docker/compose.yaml"), "config"]
    done = subprocess.run(line, env=os.environ | VALUES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(composed()["services"])
    for name in VALUES:
        without = {key: value for key, value in VALUES.items() if key != name}
        done = subprocess.run(line, env=os.environ | without, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert name in done.stderr


def _works(line: list[str]) -> bool:
    if shutil.which(line[0]) is None:
        return False
    return subprocess.run([*line, "version"], capture_output=True, timeout=60).returncode == 0
