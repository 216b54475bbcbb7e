"""The other loaders' environment, `.bench`: a virtual environment that sees the project's own and adds to it.

The project's packages are found through a path file, so torch is not installed twice and nothing of it changes; what
the other loaders need on top goes into `.bench` alone, a requirement at a time, so that one that cannot be installed
does not keep the others from it.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ROOT = Path(__file__).parents[3]
_DEBIAN = {"pkg-config": "pkg-config", "opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}


def make(folder: Path, install: bool = True) -> tuple[Path, dict[str, str]]:
    """The interpreter of the environment in `folder`, made or completed if `install`, and why a library is not in it.

    Without `install` and without an environment it is the interpreter that runs this.
    """
    # Not resolved: the link is what makes it this environment's interpreter.
    interpreter = folder.absolute() / "bin" / "python"
    here = Path(sysconfig.get_paths()["purelib"])
    linked = folder / "lib" / here.parent.name / here.name / "project.pth"
    if install and not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        linked.write_text(f"{here}\n")
    if not interpreter.exists():
        return Path(sys.executable), {}
    failed = {}
    for requirement in requirements():
        name = requirement.partition("==")[0]
        if install and not _installed(interpreter, requirement):
            print(f"installing {requirement} into {folder}", file=sys.stderr, flush=True)
            reason = _install(interpreter, requirement)
            if reason:
                failed[name] = reason
    return interpreter, failed


def requirements() -> list[str]:
    """The pinned lines of requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


def missing_for_ffcv() -> list[str]:
    """Debian packages that compiling FFCV needs and that are not there."""
    if shutil.which("pkg-config") is None:
        return list(_DEBIAN.values())
    absent = [
        package
        for name, package in _DEBIAN.items()
        if name != "pkg-config" and subprocess.run(["pkg-config", "--exists", name]).returncode
    ]
    return absent + (["g++"] if shutil.which("g++") is None else [])


def _installed(interpreter: Path, requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    program = "import sys, importlib.metadata as m; sys.exit(m.version(sys.argv[1]) != sys.argv[2])"
    return not subprocess.run([str(interpreter), "-c", program, name, version], capture_output=True).returncode


def _install(interpreter: Path, requirement: str) -> str:
    """Why it could not be installed, or nothing."""
    if requirement.startswith("ffcv") and (absent := missing_for_ffcv()):
        return f"to compile it: apt-get install {' '.join(absent)}"
    line = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*line, "-c", str(ROOT / "constraints.txt"), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    words = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["no reason"]
    return f"pip: {words[-1].strip()}"
