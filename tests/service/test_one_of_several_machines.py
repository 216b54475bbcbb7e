"""One machine's part in a job of several: real torchrun at a real rendezvous, with a small stand-in for the worker."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from service import ownership
from service.errors import ConfigError, JobError, TakenError
from service.jobs import local, torchrun
from service.jobs.nodes import Nodes
from service.ownership import Ownership
from service.run_folder import RunFolder
from service.training import entrance, pulse

ROOT = Path(__file__).parents[2]

CONFIG = """
name: job
global_batch: 8
micro_batch: 4
data: {name: demo, root: drawn, size: 32, options: {train_count: 12, val_count: 10, size: 48}}
tracking: {uri: "sqlite:///unused.db"}
"""
# It says what it was given, and leaves the job's name and a checkpoint as a worker does that is lost later.
WORKER = """
import json, os, pathlib, sys
from service.run_folder import RunFolder
RunFolder(pathlib.Path("runs/job")).note_meeting(os.environ["TORCHELASTIC_RUN_ID"])
with open("given.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
pathlib.Path("runs/job/checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.yaml").write_text(CONFIG)
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "WORKER", "stand_in")
    monkeypatch.setattr(local.tracking, "ensure_ready", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    return tmp_path


def test_a_machine_waits_for_the_rendezvous_and_one_that_comes_back_goes_on_with_its_run(here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened: list[TCPStore] = []

    def say(text: str) -> None:
        if text == f"waiting for the rendezvous at 127.0.0.1:{port}":
            opened.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))

    place = {"workers": 1, "nnodes": "1", "rdzv": f"127.0.0.1:{port}"}
    local.run("job.yaml", run_id="week", say=say, **place)  # type: ignore[arg-type]
    assert len(opened) == 1
    del opened[:]
    local.run("job.yaml", run_id="week", say=say, **place)  # type: ignore[arg-type]
    given = [json.loads(line) for line in (here / "given.jsonl").read_text().splitlines()]
    # Whoever comes first has nothing to go on with yet, and those that join it later have.
    assert given == [["job.yaml", "--resume"]] * 2
    with pytest.raises(ConfigError, match="holds an earlier run"):
        local.run("job.yaml", run_id="another", say=say, **place)  # type: ignore[arg-type]


@pytest.fixture
def rendezvous() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def first(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """The folder of a job that runs on other machines, and meets as "first"; one of its workers has failed before."""
    monkeypatch.setattr(ownership, "WATCH_S", 0.5)
    folder = RunFolder(here / "runs/job")
    folder.make()
    owner = Ownership(folder.path)
    owner.take()
    folder.note_meeting("first")
    folder.error.write_text('{"message": "of the first job"}')
    yield folder
    owner.release()


@pytest.mark.parametrize("resume", [False, True])
def test_a_job_of_another_name_is_refused_before_it_touches_anything_of_the_one_that_runs(
    first: RunFolder, rendezvous: TCPStore, resume: bool
) -> None:
    with pytest.raises(TakenError, match=f"another job runs there \\(process {os.getpid()} on "):
        local.run(
            "job.yaml", run_id="second", workers=1, nnodes="1", rdzv=f"127.0.0.1:{rendezvous.port}", resume=resume
        )
    assert first.meeting == "first"
    assert "of the first job" in first.error.read_text()
    assert not Path("given.jsonl").exists()


def test_a_machine_of_the_job_that_runs_joins_it(first: RunFolder, rendezvous: TCPStore) -> None:
    local.run("job.yaml", run_id="first", workers=1, nnodes="1", rdzv=f"127.0.0.1:{rendezvous.port}")
    assert Path("given.jsonl").exists()


def test_a_machine_whose_fellow_takes_the_folder_in_that_moment_joins_it(
    first: RunFolder, rendezvous: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.note_meeting("before")

    def refuse(path: Path) -> bool:
        first.note_meeting("first")
        raise TakenError("another job runs there")

    monkeypatch.setattr(ownership, "refuse_if_owned", refuse)
    local.run("job.yaml", run_id="first", workers=1, nnodes="1", rdzv=f"127.0.0.1:{rendezvous.port}")
    assert Path("given.jsonl").exists()


def test_a_machine_that_meets_another_looking_at_the_folder_looks_once_more(
    here: Path, rendezvous: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def refuse_once(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 1:
            raise TakenError("another job runs there")
        return False

    monkeypatch.setattr(ownership, "refuse_if_owned", refuse_once)
    local.run("job.yaml", run_id="new", workers=1, nnodes="1", rdzv=f"127.0.0.1:{rendezvous.port}")
    assert Path("given.jsonl").exists()
    assert len(looks) == 2


def test_who_has_a_folder_writes_down_where_its_machines_meet_and_that_one_alone_meets_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "week")
    monkeypatch.setenv(pulse.VARIABLE, "login1:29400")
    entrance.note_meeting(folder)
    assert folder.meeting == "week"
    monkeypatch.delenv(pulse.VARIABLE)
    entrance.note_meeting(folder)
    assert folder.meeting == ""


def test_a_machine_that_no_other_joins_gives_up_and_the_same_name_serves_until_the_job_has_ended(
    here: Path, rendezvous: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"workers": 1, "rdzv": f"127.0.0.1:{rendezvous.port}"}
    with monkeypatch.context() as impatient:
        impatient.setitem(torchrun._RENDEZVOUS, "join_timeout", 3)
        with pytest.raises(JobError, match="too few machines came to the rendezvous") as ended:
            local.run("job.yaml", nnodes="2", **place)  # type: ignore[arg-type]
    assert ended.value.exit_code == 8
    assert not (here / "given.jsonl").exists()
    local.run("job.yaml", nnodes="1", **place)  # type: ignore[arg-type]
    assert (here / "given.jsonl").exists()
    with pytest.raises(JobError, match="the job has ended at this rendezvous"):
        local.run("job.yaml", nnodes="1", **place)  # type: ignore[arg-type]


# A launcher, which says with its exit code whether it was let into the folder.
LAUNCHER = """
import pathlib, sys
from service.errors import TakenError
from service.jobs import local
from service.jobs.nodes import Nodes
from service.run_folder import RunFolder
try:
    nodes = Nodes(1, 2, "meet.example", 29400, "job", sys.argv[1])
    local.launch(RunFolder(pathlib.Path("runs/job")), [sys.executable, "-c", "print('in')"], 1, nodes=nodes)
except TakenError as error:
    print(error)
"""


@pytest.mark.parametrize(("address", "said"), [("10.0.0.2", "in"), ("10.0.0.1", "another job runs there")])
def test_each_machine_launches_once_in_the_folder_that_all_of_them_share(
    here: Path, address: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, nodes = RunFolder(here / "runs/job"), Nodes(1, 2, "meet.example", 29400, "job", "10.0.0.1")
    local.launch(folder, [sys.executable, "-c", LAUNCHER, address], 1, nodes=nodes)
    assert said in capfd.readouterr().out
    assert (folder.path / "torchrun-10.0.0.1.log").exists()
