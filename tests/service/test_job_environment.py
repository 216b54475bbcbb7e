"""What a job's environment may hold, what of it is written down, and who can read where the job lives."""

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from service.errors import ConfigError
from service.jobs import orders
from service.jobs.backends import Order
from service.jobs.backends.local import backend as local
from service.jobs.job import Attempt, Job
from service.jobs.spec import JobSpec
from tests.service.job_specs import settings, spec

ID = "0123456789abcdef" * 2
NAME = f"lorot-{ID[:12]}-1"
URI = "http://user:pass-word@host:5000"


def job(**fields: Any) -> Job:
    return Job(ID, "1", spec(**fields), "starting")


@pytest.mark.parametrize(
    "name",
    ["BASH_ENV", "OMP_TOOL_LIBRARIES", "NCCL_NET_PLUGIN", "NCCL_DEBUG_FILE", "TORCH_LOGS_OUT", "HTTPS_PROXY", "TMPDIR"],
)
def test_a_local_job_sets_no_variable_that_is_not_known_to_be_harmless(tmp_path: Path, name: str) -> None:
    backend = local.Local(settings(tmp_path))
    with pytest.raises(ConfigError, match=f"environment.{name}"):
        backend.check(job(environment={name: "x"}))
    with pytest.raises(ConfigError, match=f"secrets.{name}"):
        backend.check(job(secrets={name: "x"}))
    backend.check(job(environment={"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO"}, secrets={"HF_TOKEN": "hub"}))


def test_the_operator_allows_local_jobs_more_variables(tmp_path: Path) -> None:
    own = settings(tmp_path, backends={"local": {"environment": ["NOTE", "WANDB_*"]}})
    local.Local(own).check(job(environment={"NOTE": "1"}, secrets={"WANDB_API_KEY": "key"}))
    with pytest.raises(ConfigError, match="NOTES"):
        local.Local(own).check(job(environment={"NOTES": "1"}))


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"])
def test_gpus_are_the_service_s_to_hand_out(name: str) -> None:
    with pytest.raises(ValidationError, match="set by the service"):
        spec(environment={name: "0"})


@pytest.mark.parametrize(
    "fields",
    [
        {"environment": {"A": "x\0y"}},
        {"model": "models:/a\0b", "kind": "detect"},
        {"experiment": "a\0b"},
        {"config": {"data": {"root": ["a\0b"]}}},
        {"config": {"data": {"root": "\ud800"}}},
        {"kind": "container", "backend": "docker", "command": ["a\0b"], "config": {}},
        {"kind": "container", "backend": "docker", "command": ["a"], "outputs": ["a\0b"], "config": {}},
    ],
)
def test_a_spec_holds_no_text_that_no_program_takes(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="NUL"):
        JobSpec(**fields)


def test_a_secret_with_a_nul_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a\0b")
    with pytest.raises(ConfigError, match=r"'key'.* has a NUL"):
        orders.secret_values(spec(secrets={"HF_TOKEN": "key"}), settings(tmp_path, secrets=tmp_path))


def test_a_local_job_inherits_what_it_needs_and_its_password_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def popen(line: list[str], *, env: dict[str, str], **_: Any) -> None:
        started.append(env)

    monkeypatch.setattr(subprocess, "Popen", popen)
    for name in (
        "SERVICE_PASSWORD",
        "LOROT_TOKEN",
        "LOROT_DATABASE",
        "LOROT_RUN_ID",
        "LOROT_CACHE",
        "AWS_PROFILE",
        "MLFLOW_TRACKING_URI",
    ):
        monkeypatch.setenv(name, "inherited")
    own = settings(tmp_path, tracking_uri=URI)
    made = orders.order(job(), Attempt(1, NAME), own, {}, ())
    orders.prepare(made, own, {})
    local.Local(own).start(made)
    (env,) = started
    assert not env.keys() & {"SERVICE_PASSWORD", "LOROT_TOKEN", "LOROT_DATABASE", "LOROT_RUN_ID"}
    assert (env["LOROT_CACHE"], env["AWS_PROFILE"], env["PATH"]) == ("inherited", "inherited", os.environ["PATH"])
    assert env["MLFLOW_TRACKING_URI"] == URI
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"pass-word" in path.read_bytes()]
    told = made.folder / "attempts" / "1" / "order.json"
    assert json.loads(told.read_text())["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert stat.S_IMODE(told.stat().st_mode) == 0o600


def test_a_local_job_imports_this_very_program_before_anything_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "of-the-service")
    assert local._inherited(())["PYTHONPATH"].split(os.pathsep) == [str(Path(__file__).parents[2]), "of-the-service"]


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    own = psutil.Process()
    told = {"pid": own.pid, "started_s": own.create_time()}
    assert local._process(told) == own
    # The machine's own start is another second after its clock was corrected.
    for corrected in (-1.01, 1.01):
        assert local._process({**told, "started_s": own.create_time() + corrected}) == own
    # As after the machine has given the number of a command that has ended to another process.
    assert local._process({**told, "started_s": own.create_time() - 60}) is None
    assert local._process({"pid": own.pid}) is None
    assert local._process(None) is None


@pytest.mark.parametrize(("backend", "mode"), [("local", 0o700), ("docker", 0o711)])
def test_job_folders_are_closed_to_others_but_for_what_a_container_writes_to(
    tmp_path: Path, backend: str, mode: int
) -> None:
    own = settings(tmp_path, tracking_uri="http://host:5000")
    made = Order(NAME, job(backend=backend), orders.folder_of(own, ID), ("x",))
    orders.prepare(made, own, {})
    places = [made.folder, made.folder / "attempts", made.folder / "attempts" / "1"]
    assert [stat.S_IMODE(place.stat().st_mode) for place in places] == [mode, 0o700, 0o700]


@pytest.mark.parametrize(("backend", "made"), [("local", []), ("docker", []), ("kubernetes", ["outputs", "run"])])
def test_what_a_place_mounts_and_does_not_give_away_is_there_before(
    tmp_path: Path, backend: str, made: list[str]
) -> None:
    own = settings(tmp_path, tracking_uri="http://host:5000")
    order = Order(NAME, job(backend=backend), orders.folder_of(own, ID), ("x",))
    orders.prepare(order, own, {})
    assert sorted(place.name for place in order.folder.iterdir() if place.name in ("run", "outputs")) == made


def test_the_outputs_of_a_container_are_closed_to_others_where_they_are_given_to_its_user(tmp_path: Path) -> None:
    own = settings(tmp_path)
    container = Job(ID, "1", JobSpec(kind="container", backend="docker", command=("true",)), "starting")
    order = Order(NAME, container, orders.folder_of(own, ID), ("true",))
    orders.prepare(order, own, {})
    assert stat.S_IMODE((order.folder / "outputs").stat().st_mode) == 0o700
