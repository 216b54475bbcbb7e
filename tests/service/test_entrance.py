"""How a worker's end is told: to whom, and where not. A process each, since an error ends it on the spot."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import atexit
import os
import sys
from service import errors
from service.ownership import Ownership
from service.training import entrance

def body(job, folder, terminal):
    kind = sys.argv[1]
    if kind == "take":
        Ownership(folder.path).take()
        entrance.forget_earlier(folder)
        raise errors.DataError("new trouble")
    if kind == "full":
        folder.claim(resume=False)
        folder.error.unlink()
        try:
            with (folder.path / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        except OSError as error:
            raise errors.StorageError("no room for a checkpoint") from error
    if kind == "done":
        print("the last line")
        terminal.write("it is done")
        atexit.register(os.abort)
        return
    raise getattr(errors, kind)("what is wrong")

entrance.enter("job.yaml", [], body)
"""


def enter(place: Path, kind: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, what the terminal was told, and error.json, in which an earlier attempt has left a message."""
    (place / "job.yaml").write_text("{name: job, data: {name: demo}}")
    error = place / "runs/job/error.json"
    error.parent.mkdir(parents=True, exist_ok=True)
    if not error.exists():
        error.write_text('{"message": "old news", "exit_code": 8}')
        os.utime(error, (1, 1))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOROT"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        cwd=place,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, str(json.loads(error.read_text())["message"]) if error.exists() else ""


@pytest.mark.parametrize(("kind", "code"), [("TakenError", 2), ("SucceededError", 7)])
@pytest.mark.parametrize("launched", [{}, {"LOROT_LAUNCHED": "1"}])
def test_that_the_folder_is_another_jobs_is_told_on_the_terminal_and_not_in_that_folder(
    tmp_path: Path, kind: str, code: int, launched: dict[str, str]
) -> None:
    (tmp_path / "runs/job").mkdir(parents=True)
    found = enter(tmp_path, kind, **launched)
    assert found == (code, "error: what is wrong\n", "old news")
    (tmp_path / "runs/job/error.json").write_text('{"message": "news of the other job"}')
    assert enter(tmp_path, kind, **launched)[2] == "news of the other job"
    (tmp_path / "runs/job/error.json").unlink()


def test_an_earlier_error_is_forgotten_with_the_taking_of_the_folder_and_not_before(tmp_path: Path) -> None:
    assert enter(tmp_path, "ConfigError")[2] == "old news"
    assert enter(tmp_path, "take") == (3, "error: new trouble\n", "new trouble")


def test_an_error_of_a_moment_before_this_process_began_is_an_earlier_one(tmp_path: Path) -> None:
    """As where torchrun starts lost workers again."""
    error = tmp_path / "runs/job/error.json"
    error.parent.mkdir(parents=True)
    error.write_text('{"message": "news of a moment ago"}')
    time.sleep(0.05)
    assert enter(tmp_path, "take")[2] == "new trouble"


def test_a_process_knows_to_a_hundredth_when_it_began() -> None:
    line = [sys.executable, "-c", "from service.training import entrance; print(entrance._began_s())"]
    before_s = time.time()
    child = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    after_s = time.time()
    began_s = float(child.communicate()[0])
    assert before_s - 0.02 < began_s < after_s + 0.02


@pytest.mark.parametrize(("restarts", "told"), [("0", "old news"), ("3", "new trouble")])
def test_of_a_launcher_that_has_cleared_the_folder_only_restarted_workers_clear_it_again(
    tmp_path: Path, restarts: str, told: str
) -> None:
    found = enter(tmp_path, "take", LOROT_LAUNCHED="1", TORCHELASTIC_MAX_RESTARTS=restarts)
    assert found == (3, "", told)


def test_whose_work_is_done_ends_well_whatever_the_interpreters_end_would_do(tmp_path: Path) -> None:
    (tmp_path / "runs/job").mkdir(parents=True)
    assert enter(tmp_path, "done")[:2] == (0, "it is done")
    assert "the last line" in (tmp_path / "runs/job/log-rank0.txt").read_text()


def test_a_full_disk_takes_the_last_words_all_the_same(tmp_path: Path) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=1m", "lorot-test", str(disk)]
    if (mounted := subprocess.run(line, capture_output=True, text=True)).returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        code, _, told = enter(tmp_path, "full")
        assert (code, told) == (7, "no room for a checkpoint")
        assert "no room for a checkpoint" in (disk / "job/log-rank0.txt").read_text()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
