"""What a result came from: the code's commit and the versions of the packages that made it. Imports none of them."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# DALI's distribution is named after its CUDA flavour.
_PACKAGES = {
    "lorot": ("lorot",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "deepspeed": ("deepspeed",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "numpy": ("numpy",),
}


def package_versions() -> dict[str, str]:
    """Versions of python, lorot, torch, torchvision, dali, deepspeed, mlflow and numpy, those that are installed."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of settings, as 64 hex digits: the same for the same JSON values, in whatever order they are given."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_version(root: Path = _ROOT) -> dict[str, str]:
    """`{"git.commit": 40 hex digits, "git.dirty": "true"|"false"}` of the checkout that holds the code; else empty.

    A checkout that merely surrounds an installed copy (a virtual environment inside somebody's repository) is not it:
    the code has to be tracked by it.
    """
    if _git(root, "ls-files", "--error-unmatch", "service/config.py") is None:
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _git(root: Path, *arguments: str) -> str | None:
    # A hook or a rebase that runs us exports GIT_DIR and friends, which would point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
