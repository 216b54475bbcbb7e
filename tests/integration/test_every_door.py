"""A training handed in by curl, by the command line and by a browser becomes a registered model, wherever it runs.

The places are this machine, a container, two containers that train together, and such two of the image that is shipped.
All share one service, one engine, one MLflow server and one data set.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, expect

from service import registry, store
from tests.integration import composition, docker_service
from tests.integration import engine as engines
from tests.integration.browser import Watched
from tests.integration.docker_service import LIMITS
from tests.integration.engine import Engine
from tests.integration.processes import await_
from tests.integration.service_process import CONFIG, Service, draw_demo, lorot

pytestmark = pytest.mark.integration

# One epoch of the 64 pictures.
STEPS = 8


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Attributes:
        backend, nodes: as a spec has them.
        resources: of a node, besides the defaults.
        mounts: folders of this machine that it asks to see.
        is_shipped: it runs in an image of docker/Dockerfile, which it names, and not in the service's.
    """

    backend: str
    nodes: str = "1"
    resources: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    is_shipped: bool = False


PLACES = {
    "local": Place("local"),
    "docker": Place("docker", "1", LIMITS, engines.mounts()),
    "two-nodes": Place("docker", "2", LIMITS, engines.mounts()),
    "shipped": Place("docker", "2", LIMITS, is_shipped=True),
}


@pytest.fixture(scope="module")
def service(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With both backends and drawn pictures."""
    with docker_service.prepared(engine, tmp_path_factory.mktemp("doors")) as made:
        draw_demo(made.folder / "data" / "demo")
        made.start()
        yield made


def configuration(service: Service, model: str) -> str:
    return CONFIG.format(root=service.folder, steps=STEPS, model=model)


def by_curl(service: Service, chromium: Browser, place: Place, image: str, name: str) -> str:
    config = yaml.safe_load(configuration(service, name))
    spec = {"name": name, "backend": place.backend, "nodes": place.nodes, "mounts": place.mounts, "config": config}
    spec |= {"image": image} if image else {}
    body = {"spec": spec | {"resources": dict(place.resources)}, "key": name}
    line = ["curl", "--silent", "--show-error", "--fail-with-body", "--header", "Content-Type: application/json"]
    # While a busy machine says 503; to a file, in which only the last answer stays.
    answer = service.folder / f"{name}.json"
    line += ["--retry", "8", "--retry-delay", "3", "--output", str(answer)]
    line += ["--data-binary", "@-", f"{service.url}/v1/jobs"]
    done = subprocess.run(line, input=json.dumps(body), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{answer.read_text() if answer.exists() else ''}\n{done.stderr}"
    return str(json.loads(answer.read_text())["id"])


def by_command(service: Service, chromium: Browser, place: Place, image: str, name: str) -> str:
    file = service.folder / f"{name}.yaml"
    file.write_text(configuration(service, name))
    options = ["--backend", place.backend, "--nodes", place.nodes, "--name", name]
    for key, value in place.resources.items():
        options += [f"--{key}", value]
    for mount in place.mounts:
        options += ["--mount", mount]
    options += ["--image", image] if image else []
    done = lorot(service.folder, "submit", str(file), *options, "--server", service.url, "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["id"])


def by_browser(service: Service, chromium: Browser, place: Place, image: str, name: str) -> str:
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        watched = Watched(context, service.url)
        page = watched.open("/submit")
        page.get_by_label("Name", exact=True).fill(name)
        page.get_by_label("Configuration", exact=True).select_option("")
        page.get_by_label("YAML", exact=True).fill(configuration(service, name))
        page.get_by_label("Backend", exact=True).select_option(place.backend)
        page.get_by_label("Nodes", exact=True).fill(place.nodes)
        if image:
            page.get_by_label("Image", exact=True).fill(image)
        if place.resources:
            page.get_by_label("Memory of a node", exact=True).fill(place.resources["memory"])
            page.get_by_text("More: priority").click()
            page.get_by_label("Shared memory", exact=True).fill(place.resources["shm"])
            page.get_by_label("Folders to mount", exact=True).fill("\n".join(place.mounts))
        expect(page.locator("#verdict")).to_contain_text("No problem was found")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        assert watched.wrong == []
        found = re.fullmatch(rf"{service.url}/jobs/([0-9a-f]{{32}})", page.url)
        assert found, page.url
        return found[1]


DOORS: Mapping[str, Callable[[Service, Browser, Place, str, str], str]] = {
    "curl": by_curl,
    "command": by_command,
    "browser": by_browser,
}


@pytest.mark.parametrize("where", PLACES)
def test_a_job_becomes_a_registered_model_by_whichever_door_it_came(
    service: Service, engine: Engine, chromium: Browser, where: str
) -> None:
    place = PLACES[where]
    image = composition.build_worker(engine) if place.is_shipped else ""
    # All are handed in before the first has ended: they share the machine.
    jobs = {}
    for door, submit in DOORS.items():
        name = f"{door}-{where}"
        jobs[name] = submit(service, chromium, place, image, name)
    for name, job in jobs.items():
        check_job(service, place, name, job)
    for name, job in jobs.items():
        check_model(service, name, job)
    with chromium.new_context() as context:
        watched = Watched(context, service.url)
        for name in jobs:
            page = watched.open("/models")
            page.get_by_role("link", name=name, exact=True).click()
            page.get_by_role("link", name="version 1", exact=True).click()
            expect(page.get_by_role("heading", level=1)).to_have_text(f"{name}, version 1")
            expect(page.locator("#its-job")).to_have_text(name)
        assert watched.wrong == []


def check_job(service: Service, place: Place, name: str, job: str) -> None:
    ended = awaited(service, job)
    assert (ended["name"], ended["backend"], ended["failures"]) == (name, place.backend, 0)
    (attempt,) = ended["attempts"]
    assert attempt["exit_code"] == 0
    assert bool(attempt["image_digest"]) == (place.backend == "docker")
    folder = service.folder / "jobs" / job
    logs = {path.name for path in (folder / "attempts" / "1").glob("log-node*.txt")}
    assert logs == {f"log-node{node}.txt" for node in range(int(place.nodes))}
    # Each node had a worker, and they were one job: the ranks of one group.
    ranks = {path.name for path in (folder / "run").glob("log-rank*.txt")}
    assert ranks == {f"log-rank{rank}.txt" for rank in range(int(place.nodes))}


def check_model(service: Service, name: str, job: str) -> None:
    await_(lambda: name in newest(service), f"model {name} is listed", 60)
    model = newest(service)[name]
    assert (model["version"], model["run_id"]) == (1, job)
    assert 0 <= model["metrics"]["val/top1"] <= 1
    # MLflow itself knows it, and what it has can be used.
    (version,) = store.client(service.uri).search_model_versions(f"name='{name}'")
    assert version.run_id == job
    _, card, resolved = registry.load(f"models:/{name}/1", service.uri)
    assert (card.model["name"], resolved.run_id) == ("resnet_small", job)


def newest(service: Service) -> dict[str, dict[str, Any]]:
    """What the API lists of models, by name."""
    return {one["name"]: one for one in service.ask("GET", "/v1/models")["models"]}


def awaited(service: Service, job: str) -> dict[str, Any]:
    """The job, once it has finished."""

    def told() -> str:
        shown = service.ask("GET", f"/v1/jobs/{job}")
        logs = sorted((service.folder / "jobs" / job).glob("**/log-*.txt"))
        return "\n".join([str(shown), *(f"{path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)])

    def has_ended() -> bool:
        return service.ask("GET", f"/v1/jobs/{job}")["state"] in ("finished", "failed", "killed")

    await_(has_ended, f"job {job} ends", 480, told)
    ended: dict[str, Any] = service.ask("GET", f"/v1/jobs/{job}")
    assert (ended["state"], ended["reason"]) == ("finished", ""), told()
    return ended
