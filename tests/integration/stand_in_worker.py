"""A job as a user starts it, but for its workers: they run a program that changes training's own before it begins.

`lorot train`, torchrun and all that happens between processes are real.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LAUNCHER = """
import sys
from service import cli
from service.jobs import local
local.WORKER = "stand_in"
sys.exit(cli.main(sys.argv[1:]))
"""


def start(folder: Path, program: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start `lorot train` with these arguments; what both of its outputs say can be read from the one.

    Args:
        folder: for the program.
        program: ends with `sys.exit(worker.main())`, of service.training.worker.
    """
    (folder / "stand_in.py").write_text(program)
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, "train", *arguments],
        env=os.environ | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
