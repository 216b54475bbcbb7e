"""A launch backend is one file, found by its name, and its section of the settings: nothing else knows of it."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import ConfigError
from service.jobs import allowed, backends, checking, traits
from service.jobs.queue import Amount
from service.jobs.settings import BackendSettings, ServiceSettings, complete
from service.jobs.spec import JobSpec
from tests.service.job_specs import CONFIG, settings, spec
from tests.service.memory_backend import MemoryBackend

ROOT = Path(__file__).parents[2]
# Lines in which such a word is something else: the kubernetes backend's own manifests, libraries that have loggers,
# whoever asks without a token.
MEANS_OTHERWISE = {
    "jobs/manifests/pods.py": "from service.jobs.backends.kubernetes import TRAITS",
    "jobs/manifests/rendering.py": "place = settings.backends.kubernetes",
    "api/structured_log.py": 'for name in ("urllib3", ',
    "api/tokens.py": 'LOCAL = "local"',
    "console/job_pages.py": "found.owner or 'local'",
    "console/templates/jobs.html": 'job.owner or "local"',
}
SETTINGS = """
data_roots: [data]
data_urls: ["s3://bucket"]
worker_tracking_uri: http://inside:5000
backends:
  local: {enabled: false}
  fleet: {enabled: true, machines: 8}
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> dict[str, Any]:
    """What fleet_program saw: the same service, with one more file among its backends."""
    tree, work = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "service", tree / "service", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/service/fleet_backend.py", tree / "service/jobs/backends/fleet.py")
    (tree / "service/jobs/backends/_parts.py").write_text("raise RuntimeError('what several share is no backend')")
    (tree / "configs").symlink_to(ROOT / "configs")
    (work / "mlruns").mkdir()
    shutil.copy(empty_database, work / "mlruns/mlflow.db")
    (work / "service.yaml").write_text(SETTINGS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "LOROT_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.fleet_program"],
        cwd=work,
        env={
            **environment,
            "PYTHONPATH": f"{tree}:{ROOT}",
            "PYTHONSAFEPATH": "1",
            "LOROT_CACHE": str(work / "cache"),
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_one_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traits, "NAMES", (*traits.NAMES, "away"))
    with pytest.raises(ConfigError, match=r"^backend away: service\.jobs\.backends\.away cannot be imported"):
        traits.of("away")


def test_each_backend_declares_what_is_asked_of_it() -> None:
    assert traits.NAMES == ("local", "docker", "kubernetes"), "a new one follows these"
    assert tuple(BackendSettings.model_fields) == traits.NAMES
    assert complete() is ServiceSettings
    for name in traits.NAMES:
        place = traits.module(name)
        assert isinstance(place.TRAITS, traits.Traits)
        assert place.make(ServiceSettings()).name == name
        assert BackendSettings.model_fields[name].annotation.model_fields["enabled"]  # type: ignore[union-attr]
    assert tuple(JobSpec.model_json_schema()["properties"]["backend"]["enum"]) == traits.NAMES


def test_a_cluster_has_its_own_data_and_secrets_and_the_others_the_service_s(tmp_path: Path) -> None:
    own = settings(tmp_path, backends={"kubernetes": {"data_claim": "sets"}})
    assert [Path("/data") in allowed.roots(own, name) for name in traits.NAMES] == [False, False, True]
    assert Path("/data") not in allowed.roots(settings(tmp_path), "kubernetes")
    for name in traits.NAMES:
        given = spec(
            backend=name,
            secrets={"KEY": "one"},
            config={**CONFIG, "data": {**CONFIG["data"], "root": str(tmp_path / "data")}},
        )
        told = (
            contextlib.nullcontext() if name == "kubernetes" else pytest.raises(ConfigError, match="keeps no secrets")
        )
        with told:
            checking.check(given, own, MemoryBackend(name), Amount(4, 8.0, 2**40))


def test_nothing_elsewhere_knows_a_backend_by_its_name() -> None:
    """No text in the code is one's name, however it is compared, looked up or handed on; nobody imports one."""
    own = (ROOT / "service/jobs/backends", ROOT / "service/jobs/traits.py")
    found = []
    for path in sorted((ROOT / "service").rglob("*")):
        if path.suffix not in (".py", ".html", ".css", ".js") or any(path.is_relative_to(one) for one in own):
            continue
        text, name = path.read_text(), path.relative_to(ROOT / "service").as_posix()
        for number in (_named if path.suffix == ".py" else _quoted)(text):
            if MEANS_OTHERWISE.get(name, "\n") not in text.splitlines()[number - 1]:
                found.append(f"{name}:{number}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'if spec.backend == "docker": pass',
        'if spec.backend in ("docker", *others): pass',
        'match spec.backend:\n    case "docker" | "fleet": pass',
        'TABLE = {"docker": 1}',
        "TABLE = dict(docker=1)",
        'value = TABLE["docker"]',
        'JobSpec(backend="docker")',
        'if spec.backend.startswith("docker"): pass',
        "text = f\"{job.backend or 'docker'}\"",
        "from service.jobs.backends.docker import TRAITS",
        "from service.jobs.backends import docker",
        "import service.jobs.backends.docker.engine",
        "if desk.settings.backends.docker.enabled: pass",
    ],
)
def test_every_way_to_know_a_backend_by_its_name_is_seen(line: str) -> None:
    assert _named(line) == [2 if "case" in line else 1]


def test_a_page_that_knows_a_backend_by_its_name_is_seen() -> None:
    for line in ('{% if job.backend == "docker" %}', "#backend option[value='docker']", "{'docker': 1}", '"docker"'):
        assert _quoted(f"\n{line}") == [2]


def _named(code: str) -> list[int]:
    """The lines of a module that have a backend's name as a text, a keyword, or a part of what is imported or asked."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names: list[object] = []
        if isinstance(node, ast.Constant):
            names = [node.value]
        elif isinstance(node, ast.keyword):
            names = [node.arg]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            whose = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
            names = [node.attr] if whose == "backends" else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            whole = [f"{getattr(node, 'module', None) or ''}.{one.name}".split(".") for one in node.names]
            names = [name for one in whole if "backends" in one for name in one]
        if any(name in traits.NAMES for name in names):
            found.add(getattr(node, "lineno", 0))
    return sorted(found)


def _quoted(text: str) -> list[int]:
    """The lines that have a backend's name in quotes."""
    name = re.compile(f"""["'](?:{"|".join(traits.NAMES)})["']""")
    return [number for number, line in enumerate(text.splitlines(), 1) if name.search(line)]


def test_looking_at_a_job_imports_no_client_of_its_place() -> None:
    program = (
        "import sys; from service.jobs.spec import JobSpec\n"
        "for name in ('local', 'docker', 'kubernetes'): JobSpec(backend=name)\n"
        "print([name for name in ('docker', 'kubernetes', 'requests', 'psutil', 'torch') if name in sys.modules])"
    )
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    assert subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "[]"


def test_settings_made_without_a_file_have_no_further_backends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "NAMES", (*traits.NAMES, "fleet"))
    assert backends.enabled(ServiceSettings()) == ["local"]


def test_one_more_file_is_listed_behind_the_others(seen: dict[str, Any]) -> None:
    assert seen["names"] == seen["enum"] == ["local", "docker", "kubernetes", "fleet"]


def test_its_section_of_the_settings_switches_it_on(seen: dict[str, Any]) -> None:
    assert (seen["enabled"], seen["machines"]) == (["fleet"], 8)


def test_the_commands_explain_it(seen: dict[str, Any]) -> None:
    assert "backends.fleet.machines" in seen["help"]["serve"]
    assert "local,docker,kubernetesorfleet" in seen["help"]["submit"]


def test_its_section_goes_into_a_backup_and_comes_out_of_it(seen: dict[str, Any]) -> None:
    assert seen["restored"] == {"enabled": True, "machines": 8}


def test_the_form_offers_it_with_the_fields_that_it_takes(seen: dict[str, Any]) -> None:
    (option,) = seen["options"]
    assert option.keys() == {"value", "selected", "data-containers"}
    assert option["value"] == "fleet"


def test_a_job_of_it_starts_and_the_console_says_where_it_is(seen: dict[str, Any]) -> None:
    assert seen["state"] == "running"
    assert "containers of a fleet, 2 nodes" in seen["page"]


def test_its_job_sees_what_a_container_sees(seen: dict[str, Any]) -> None:
    assert seen["command"][:3] == ["lorot", "train", "/job/job.yaml"]
    assert seen["environment"]["MLFLOW_TRACKING_URI"] == "http://inside:5000"
    assert "LOROT_ARTIFACT_ROOTS" not in seen["environment"]
    assert seen["output"] == "/job"
    # Others get through to what the service has made for the containers.
    assert seen["folders"]["."] == "711"
    assert {"run", "outputs"} <= seen["folders"].keys()


def test_its_traits_decide_what_a_job_may_name(seen: dict[str, Any]) -> None:
    assert seen["cache_gb"] == 5.4, "half of 10 GiB"
    assert seen["root"] == "/fleet/demo"
    assert seen["secret"], "the service does not look for the secrets of a place that has its own"
    assert seen["container"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("nodes", "nodes: the fleet has 8"),
        ("mounts", "mounts: fleet jobs see no folders of a host"),
        ("manifests", "manifests: a fleet job has none; those of backend kubernetes have"),
        ("root", "outside of the folders that jobs may read"),
        ("local container", "the local backend is this one machine; use docker, kubernetes or fleet"),
        ("unknown", "backend: Input should be 'local', 'docker', 'kubernetes' or 'fleet'"),
        ("option", "--backend: 'flete' is none of local, docker, kubernetes, fleet"),
        ("off", "backend 'fleet' is not set up here, on are: none; its settings switch it on: backends.fleet.enabled"),
        ("unseen", "backend: fleet jobs do not see sqlite"),
        ("section", "backends.flete: unknown key; did you mean 'backends.fleet'?"),
        ("far section", "backends.qqqqq: unknown key; known here: local, docker, kubernetes, fleet"),
        ("key", "backends.fleet.machine: unknown key; did you mean 'backends.fleet.machines'?"),
        ("value", "backends.fleet.machines: Input should be greater than or equal to 1"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_there_is(seen: dict[str, Any], asked: str, words: str) -> None:
    assert words in seen["refused"][asked]
