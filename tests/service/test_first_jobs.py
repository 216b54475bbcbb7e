"""The first job of each guide is taken as it is written there, by the settings of that place, from any folder."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.datasets import demo
from service import config_file
from service.cli import app
from service.console import submission
from service.jobs import checking, settings_file
from service.jobs.backends import Backend
from service.jobs.backends.docker.backend import DockerBackend
from service.jobs.backends.kubernetes.backend import KubernetesBackend
from service.jobs.desk import Desk
from service.jobs.queue import Amount
from service.jobs.spec import JobSpec
from tests.service.kustomization import build
from tests.service.overlays import DEPLOY, OVERLAYS, of_kind, templates

ROOT = DEPLOY.parent
COMPOSED = ROOT / "docker/service.yaml"
CONFIGS = "/opt/lorot/share/lorot/"
PLACES = {"compose": COMPOSED, **{name: DEPLOY / "overlays" / name / "service.yaml" for name in OVERLAYS}}


def commands(guide: Path) -> list[list[str]]:
    """Every command of the guide's blocks of shell, as words."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", guide.read_text(), re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and "|" not in line and "'" not in line]


def submitted(guide: Path) -> list[str]:
    """The guide's command that submits the quickstart, from `submit` on, with the configuration of this checkout."""
    (line,) = (words for words in commands(guide) if "submit" in words and any("quickstart" in word for word in words))
    words = line[line.index("submit") :]
    return [str(ROOT / word.removeprefix(CONFIGS)) if word.endswith("quickstart.yaml") else word for word in words]


def previewed(words: list[str], settings: Path) -> str:
    """What the command would submit by these settings instead of the server's, which reads the same."""
    at = words.index("--server")
    words = [word for word in words[:at] + words[at + 2 :] if word != "--wait"]
    done = CliRunner().invoke(app, [*words, "--settings", str(settings), "--dry-run"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return done.output


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_first_job_on_a_cluster_is_taken_as_the_guide_has_it(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = submitted(DEPLOY / "README.md")
    found = of_kind(list(yaml.safe_load_all(previewed(words, PLACES[overlay]))), "ConfigMap")
    ((configuration,),) = (one["data"].values() for one in found.values())
    assert yaml.safe_load(configuration)["data"]["root"] == drawn_on_the_cluster()


def drawn_on_the_cluster() -> str:
    line = templates(build(DEPLOY / "demo"))["demo-data"]["spec"]["containers"][0]["args"]
    return line[line.index("--root") + 1]


def test_what_the_cluster_draws_lies_where_jobs_see_it() -> None:
    (job,) = build(DEPLOY / "demo")
    spec = job["spec"]["template"]["spec"]
    (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "data")
    assert "readOnly" not in mount
    assert Path(drawn_on_the_cluster()).is_relative_to(mount["mountPath"])
    (volume,) = (one for one in spec["volumes"] if one["name"] == "data")
    for name in OVERLAYS:
        place = settings_file.load(PLACES[name]).backends.kubernetes
        assert volume["persistentVolumeClaim"] == {"claimName": place.data_claim}
        assert spec["containers"][0]["image"] == place.image


def test_the_first_job_of_the_composition_is_taken_as_the_guide_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    guide = ROOT / "docker/README.md"
    settings = settings_file.load(COMPOSED)
    spec = JobSpec.model_validate(yaml.safe_load(previewed(submitted(guide), COMPOSED)))
    resolved = checking.check(spec, settings, DockerBackend(settings), Amount(0, 2))
    (draw,) = (words for words in commands(guide) if words[:2] == ["docker", "run"] and "demo" in words)
    drawn = draw[draw.index("--root") + 1]
    assert resolved["data"]["root"] == drawn
    host, _, inside = draw[draw.index("-v") + 1].partition(":")
    assert host == inside == str(settings.data_roots[0]), "the engine mounts folders under their own names"
    assert Path(drawn).is_relative_to(inside)
    assert draw[draw.index("data") - 1] == settings.backends.docker.image.removesuffix(":latest")


def test_what_is_drawn_is_what_the_quickstart_asks_for() -> None:
    lines = [
        templates(build(DEPLOY / "demo"))["demo-data"]["spec"]["containers"][0]["args"],
        *(words for words in commands(ROOT / "docker/README.md") if "demo" in words),
    ]
    drawn = {name: about.default for name, about in inspect.signature(demo.load).parameters.items()}
    for line in lines:
        assert line[line.index("data") :][:2] == ["data", "demo"]
        assert not any("=" in word for word in line[line.index("data") :]), "nothing but the defaults"
    options = config_file.read(ROOT / "configs/quickstart.yaml")["data"]["options"]
    assert drawn | options == drawn


@pytest.mark.parametrize("name", PLACES)
def test_the_consoles_form_is_right_as_it_is_first_shown_in_each_place(
    place: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = settings_file.load(PLACES[name])
    backend: Backend = DockerBackend(told) if name == "compose" else KubernetesBackend(told)
    # Only what is asked of the record differs: here it is in a file.
    desk = Desk(told.model_copy(update={"gpus": 0, "cpus": 2.0}), backends={backend.name: backend})
    values, notice = submission.first(told)
    checked = submission.check(values, desk)
    assert checked.problems == ()
    assert checked.resolved["data"]["root"] in notice, "nobody has drawn it here"


def test_the_plain_container_of_the_readme_needs_nothing_that_is_not_in_its_image(tmp_path: Path) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    (line,) = re.findall(r"`lorot (submit --image [^`]*)`", text)
    own = tmp_path / "service.yaml"
    own.write_text(f"state: {tmp_path}/state\nresults: {tmp_path}/jobs\nbackends: {{docker: {{enabled: true}}}}\n")
    done = CliRunner().invoke(app, ["submit", "--dry-run", "--settings", str(own), *shlex.split(line)[1:]])
    assert done.exit_code == 0, done.output
    spec = JobSpec.model_validate(yaml.safe_load(done.output))
    (output,) = spec.outputs
    assert (spec.command[:2], len(spec.command)) == (("python", "-c"), 3)
    subprocess.run([sys.executable, "-c", spec.command[2].replace("/results", str(tmp_path))], check=True)
    assert (tmp_path / output).exists()


def test_what_is_cleared_up_in_the_composition_is_a_command_that_there_is(place: str, tmp_path: Path) -> None:
    (line,) = (words for words in commands(ROOT / "docker/README.md") if "gc" in words)
    assert line[line.index("gc") - 1] == "service", "whose folders and network it has"
    words = line[line.index("gc") :]
    at = words.index("--settings")
    own = tmp_path / "service.yaml"
    own.write_text(f"state: {tmp_path}/state\nresults: {tmp_path}/jobs\n")
    done = CliRunner().invoke(app, [*words[: at + 1], str(own), *words[at + 2 :]])
    assert done.exit_code == 0, done.output
    assert "nothing was removed" in done.output
