"""A job that puts links into its folder reads nothing of the service's with them, and writes nothing over it."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service import plain_files
from service.errors import StorageError, UnknownJobError
from service.jobs import attempt_files, history, keeping, log_file, orders, shown
from service.jobs.backends import Status
from service.jobs.backends.docker import logs as docker_logs
from service.jobs.backends.kubernetes import logs as kubernetes_logs
from service.jobs.job import Attempt
from service.jobs.manifests.rendering import configuration_of
from service.jobs.record import Record
from tests.service.kubernetes_orders import CONTAINER, JOB_ID, NAME, job, order, settings

SECRET = '{"step": 1, "message": "hunter2", "total_steps": 7}\nerror: hunter2\n'


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "state" / "tokens.json"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "results" / JOB_ID
    (path / "attempts" / "1").mkdir(parents=True)
    (path / "run").mkdir()
    return path


def write(folder: Path, name: str) -> None:
    with plain_files.writing(folder, name) as file:
        file.write(b"the service's")


def keep_of_container(folder: Path) -> None:
    api = SimpleNamespace(logs=lambda *_, **__: [b"the ", b"log"], ping=lambda: True)
    docker_logs.keep(api, "c", folder, "attempts/1/log-node0.txt")


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "any": ("attempts/1/a.txt", lambda folder: write(folder, "attempts/1/a.txt")),
    "end": ("attempts/1/exit.json", lambda folder: attempt_files.note(folder, 1, Status("ended", 0))),
    "log of a pod": (
        "attempts/1/log-node0.txt",
        lambda folder: kubernetes_logs.keep(cast(Any, None), [], folder, "attempts/1/log-node0.txt"),
    ),
    "log of a container": ("attempts/1/log-node0.txt", keep_of_container),
    "configuration": ("job.yaml", lambda folder: cast(None, order(settings(folder.parents[1])))),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_where_the_service_writes_is_replaced_and_not_followed(writer: str, folder: Path, secret: Path) -> None:
    name, work = WRITERS[writer]
    path = folder / name
    path.with_name(f".{path.name}.writing").symlink_to(secret)
    path.symlink_to(secret)
    work(folder)
    assert secret.read_text() == SECRET
    assert path.is_file()
    assert not path.is_symlink()


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "configuration"])
def test_nothing_is_written_by_way_of_a_linked_folder(writer: str, folder: Path, secret: Path) -> None:
    (folder / "attempts" / "1").rmdir()
    (folder / "attempts" / "1").symlink_to(secret.parent)
    with pytest.raises((OSError, StorageError)):
        WRITERS[writer][1](folder)
    assert os.listdir(secret.parent) == [secret.name]


def test_what_was_not_written_to_its_end_is_not_there(folder: Path) -> None:
    write(folder, "a.txt")
    with contextlib.suppress(ValueError), plain_files.writing(folder, "a.txt") as file:
        file.write(b"half")
        raise ValueError("broken")
    assert (folder / "a.txt").read_bytes() == b"the service's"
    write(folder, "b/c.txt")
    assert (folder / "b" / "c.txt").read_bytes() == b"the service's"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "run/../../x", "", "run//x", "."])
def test_only_what_is_below_a_folder_has_a_name_there(name: str, folder: Path) -> None:
    (folder.parent / "x").write_text("another's")
    with pytest.raises(OSError, match="no name"):
        plain_files.reading(folder, name)


def test_pipes_and_folders_are_no_files_and_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "run" / "report.html")
    with pytest.raises(OSError, match="no regular file"):
        plain_files.reading(folder, "run/report.html")
    with pytest.raises(OSError, match="no regular file"):
        plain_files.reading(folder, "run")


@pytest.mark.parametrize("by_folder", [False, True])
def test_no_reader_follows_a_link(by_folder: bool, folder: Path, secret: Path, tmp_path: Path) -> None:
    names = ("attempts/1/log-node0.txt", "run/metrics.jsonl", "run/run.json", "run/error.json")
    if by_folder:
        for name in names:
            (secret.parent / Path(name).name).write_text(SECRET)
        for name in ("attempts/1", "run"):
            (folder / name).rmdir()
            (folder / name).symlink_to(secret.parent)
    else:
        for name in names:
            (folder / name).symlink_to(secret)
    (folder / "job.yaml").symlink_to(secret)
    log = folder / names[0]
    assert list(log_file.read(log)) == []
    assert list(log_file.read(log, tail=1)) == []
    assert history.progress(folder, is_running=True) == {}
    assert history._last_records(folder, 1000) == []
    service = settings(tmp_path)
    assert keeping.said(job(), Attempt(1, NAME), service) == ""
    made = orders.order(job(), Attempt(1, NAME), service, {})
    assert "hunter2" not in configuration_of(made)
    kept: list[object] = []
    record = SimpleNamespace(upload=lambda *given: kept.append(given), log_text=lambda *given: kept.append(given))
    keeping.keep(job(), service, cast(Record, record))
    assert kept == []


def test_a_file_that_becomes_a_link_after_it_was_listed_is_not_shown(
    folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = folder / "run" / "report.html"
    page.write_text("fine")
    with shown.opened(folder, "report.html") as file:
        assert file.read() == b"fine"
    listed = shown.files(folder)
    page.unlink()
    page.symlink_to(secret)
    monkeypatch.setattr(shown, "files", lambda _: dict(listed))
    with pytest.raises(UnknownJobError, match=r"no file 'report.html'; there are none yet"):
        shown.opened(folder, "report.html")


def test_what_is_kept_is_what_the_files_held(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_LOG_BYTES", 8)
    (folder / "job.yaml").write_text("a: 1\n")
    (folder / "attempts" / "1" / "log-node0.txt").write_bytes(b"first\nlast \xff\n")
    kept: dict[tuple[str | None, str], bytes] = {}

    def upload(_: str, path: Path, below: str | None = None) -> None:
        kept[below, path.name] = path.read_bytes()

    keeping.keep(job(**CONTAINER), settings(tmp_path), cast(Record, SimpleNamespace(upload=upload)))
    assert kept == {
        (None, "job.yaml"): b"a: 1\n",
        ("attempts/1", "log-node0.txt"): b"[5 bytes before this are left out]\n\nlast \xff\n",
    }


def test_a_cluster_finds_the_folders_that_its_pods_mount(folder: Path, tmp_path: Path) -> None:
    (folder / "run").rmdir()
    made = order(settings(tmp_path))
    assert (made.folder / "run").is_dir()
    assert (made.folder / "outputs").is_dir()
    attempt_files.note(made.folder, 1, Status("ended", 0))
    assert json.loads((made.folder / "attempts" / "1" / "exit.json").read_text())["exit_code"] == 0
