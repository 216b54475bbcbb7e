"""Where compiled kernels are kept, and when they are not used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, numba
sys.path.insert(0, sys.argv[1])
from pipelines.kernels import OPTIONS
print(OPTIONS["cache"], numba.config.CACHE_DIR)
"""


def kept(cache: Path, root: Path = ROOT) -> list[str]:
    """Whether kernels are kept, and where, in a fresh process."""
    line = [sys.executable, "-c", PROGRAM, str(root)]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    return done.stdout.split()


def copy_of_the_package(folder: Path) -> Path:
    for name in ("errors", "cache", "kernels/__init__", "kernels/turn", "augment/operations"):
        target = folder / "pipelines" / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / "pipelines" / f"{name}.py").read_bytes())
    return folder


@pytest.mark.parametrize("edited", ["kernels/turn.py", "augment/operations.py"])
def test_an_edited_source_gets_a_folder_of_its_own(tmp_path: Path, edited: str) -> None:
    root = copy_of_the_package(tmp_path / "copy")
    before = kept(tmp_path / "cache", root)
    assert before == kept(tmp_path / "cache", root)
    assert before[0] == "True"
    with (root / "pipelines" / edited).open("a") as source:
        source.write("# edited\n")
    after = kept(tmp_path / "cache", root)
    assert after[0] == "True"
    assert after[1] != before[1]


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    assert kept(tmp_path)[0] == "True"
    for folder in (tmp_path / "lorot" / "kernels").iterdir():
        folder.chmod(0o777)
    assert kept(tmp_path)[0] == "False"


def test_without_a_folder_kernels_are_compiled_anew(tmp_path: Path) -> None:
    (tmp_path / "lorot").write_text("a file in the way")
    assert kept(tmp_path)[0] == "False"


def test_compiled_kernels_that_a_power_cut_has_emptied_are_compiled_again(tmp_path: Path) -> None:
    turn = "import sys; sys.path.insert(0, sys.argv[1]); from pipelines.kernels import components; "
    turn += "import numpy; print(components._find(numpy.arange(3), 2))"
    line = [sys.executable, "-c", turn, str(ROOT)]

    def turned() -> str:
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT).stdout

    expected = turned()
    kept = {path: path.stat().st_ino for path in tmp_path.rglob("*.nb[ic]")}
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    assert turned() == expected
    assert kept == {path: path.stat().st_ino for path in kept}, "what is whole stays"
    for emptied in (".nbi", ".nbc"):
        for path in (path for path in kept if path.suffix == emptied):
            os.truncate(path, 0)
        assert turned() == expected
