"""A worker that is watched, as a process of its own: for tests of what ends it."""

import subprocess
import sys
from pathlib import Path

# A worker is a process of its own: its watchdog ends it, from a thread or from a timer that needs no Python. The test
# says in `now` how long the main thread makes no progress: by a real clock a busy machine would say it too. `looked`
# returns when the watching thread has seen what `now` is.
WORKER = """
import ctypes, faulthandler, sys, threading, time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
import torch
from service.run_folder import RunFolder
from service.training import watchdog
from service.training.distributed import World
from service.training.watchdog import Watchdog

now = [0.0]
watchdog.time = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
folder, timeout_s = Path(sys.argv[1]), float(sys.argv[2])
dog = Watchdog(RunFolder(folder), World(0, 1, 0, 1, torch.device("cpu")), timeout_s)

def signs():
    path = folder / "workers" / "rank0.json"
    return RunFolder(path.parent).read(path.name).get("count", 0)

def looked():
    first = signs()
    while signs() < first + 2:
        time.sleep(0.01)
"""
# The timer that stands behind the thread goes by the real clock.
NO_TIMER = """
Watchdog._set_timer = lambda self: None
"""


def ended(folder: Path, timeout_s: float, body: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", WORKER + body, str(folder), str(timeout_s)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
