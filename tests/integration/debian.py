"""What tests need of Debian beside Python: installed where that is possible, or refused with what is missing."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path


class RefusedError(RuntimeError):
    """This machine lacks something that a test stands on; what."""


def install(programs: Mapping[str, str], *further: str) -> None:
    """Install what is missing by apt, given each program's package; raises RefusedError where that is not possible.

    Args:
        further: packages to go with any that is missing.
    """
    if not _missing(programs):
        return
    with (Path(tempfile.gettempdir()) / "lorot-apt.lock").open("w") as lock:
        # Tests that run beside these install as well, and apt refuses to wait for all of its own locks.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install(_missing(programs), further)


def _missing(programs: Mapping[str, str]) -> dict[str, str]:
    return {program: package for program, package in programs.items() if shutil.which(program) is None}


def _install(missing: Mapping[str, str], further: tuple[str, ...]) -> None:
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RefusedError(f"{', '.join(missing)}: not installed, and only root can install Debian's packages")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    packages = sorted({*missing.values(), *further})
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RefusedError(f"apt-get {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
