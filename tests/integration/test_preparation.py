"""Preparation that is killed, or runs out of disk, goes on to the same bytes."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import datasets
from tests.pipelines.conftest import draw

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
OPTIONS = ("--split", "train", "--size", "100", "--shard-size", "400kB", "--workers", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images, so that preparing them takes a while."""
    root = tmp_path_factory.mktemp("source")
    drawn = [draw(number, 300, 400) for number in range(8)]
    for number in range(600):
        path = root / "train" / f"class{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn[number % 8].rotate(number % 7).save(path, quality=90)
    datasets.load("folder", root, "train")
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of what an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert start(source, folder).wait(timeout=240) == 0
    return hashes(folder)


def start(source: Path, folder: Path, before: str = "") -> "subprocess.Popen[str]":
    """`lorot data prepare`, with code that runs first."""
    program = f"import sys, resource\n{before}\nfrom service.cli import main\nmain(sys.argv[1:])"
    line = [sys.executable, "-c", program, "data", "prepare", str(source), str(folder), *OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hashes(folder: Path) -> dict[str, str]:
    names = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".idx", ".arrow"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def killed_after(shards: int, source: Path, folder: Path) -> list[str]:
    """Prepare until there are so many shards, then kill; the processes that it had started."""
    process = start(source, folder)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.tar"))) < shards and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    helpers = []
    # Its threads come and go.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                helpers += (task / "children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return helpers


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    total = sum(name.endswith(".tar") for name in whole)
    # The middle is a second long: a machine that stalls just then lets it pass, and the next try meets it.
    for number in range(6):
        folder = tmp_path / f"set-{number}"
        helpers = killed_after(3, source, folder)
        done = len(list(folder.glob("*.tar")))
        if len(helpers) == 2 and 3 <= done < total:
            break
    assert 3 <= done < total
    assert not (folder / "set.json").exists()
    # The processes it had started end with it.
    assert len(helpers) == 2
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{number}").exists() for number in helpers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{number}").exists() for number in helpers)

    again = start(source, folder)
    text, complaint = again.communicate(timeout=240)
    assert again.returncode == 0, complaint
    assert "shards were there" in text
    assert hashes(folder) == whole
    assert not list(folder.rglob("*partial*"))


def test_without_room_it_ends_with_its_own_code_and_goes_on_when_there_is_some(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    # The kernel refuses files above 200 kB, as a full disk would.
    full = start(source, folder, "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))")
    _, complaint = full.communicate(timeout=240)
    assert full.returncode == 7
    assert "run the same command again" in complaint
    assert not list(folder.rglob("*partial*"))
    again = start(source, folder)
    assert again.wait(timeout=240) == 0
    assert hashes(folder) == whole
