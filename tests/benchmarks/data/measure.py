"""Starts loaders in processes of their own and watches how much memory the whole tree takes."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.data.environment import ROOT

_SAMPLE_S = 0.5


class LoaderError(RuntimeError):
    """A loader could not be run; the message is the last thing that it said."""


def run(interpreter: Path, module: str, arguments: list[str], cores: int, timeout_s: float = 900) -> dict[str, Any]:
    """The JSON that `python -m module arguments` prints, and the most memory its processes took.

    Raises:
        LoaderError: it failed, or took longer than `timeout_s`.
    """
    # Without a word from us, torch, OpenMP and Numba would each start as many threads as the machine has cores.
    env = {**os.environ, "OMP_NUM_THREADS": str(cores), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(interpreter), "-m", module, *arguments],
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        watch = Watch(process.pid)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LoaderError(f"took longer than {timeout_s:.0f} s") from None
        finally:
            watch.stop()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        if code:
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise LoaderError(said[-1] if said else f"ended with code {code}")
        lines = output.read().splitlines()
        result: dict[str, Any] = json.loads(lines[-1])
        return result | {"pss_bytes": watch.pss, "rss_bytes": watch.rss}


class Watch:
    """Samples the memory of a process and its children until it is stopped.

    Attributes:
        pss, rss: the largest sums over the processes seen at once, bytes. PSS counts a page that several processes
            share, or a mapped file, by its share of each; RSS counts it in full in every one of them.
    """

    def __init__(self, pid: int) -> None:
        self.pss = self.rss = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            pss = rss = 0
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._pid)
                for process in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        info = process.memory_full_info()
                        pss, rss = pss + info.pss, rss + info.rss
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)
