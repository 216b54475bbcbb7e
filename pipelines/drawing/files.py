"""Scenes as files: `SPLIT/CLASS/0000012.jpg` and `masks/SPLIT/CLASS/0000012.png`, drawn by several processes.

A file is whole or absent, and what is there is not drawn again: interrupted work goes on where it stopped.
Started as `python -m pipelines.drawing.files JSON` this module is one of those processes.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import cache, masks
from pipelines.drawing import objects, scene
from pipelines.errors import DataError

JPEG_QUALITY = 90
# Scenes drawn between two signs of life, and the number from which starting processes pays.
_BATCH = 32
_WORTH_PROCESSES = 400
# A container of two cores on a machine of a hundred sees a hundred, and has memory for few.
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Job:
    """What to draw: samples 0 to `count` of a split, of the first `classes` classes, into `folder`."""

    folder: str
    split: str
    count: int
    size: int
    classes: int
    seed: int

    def label(self, sample: int) -> int:
        """Classes take turns, so that any number of samples is balanced."""
        return sample % self.classes

    def stem(self, sample: int) -> str:
        """The sample's path below the folder, without its ending; `masks/` + stem for the mask."""
        return f"{self.split}/{list(objects.OBJECTS)[self.label(sample)]}/{sample:07d}"


def encode(drawn: scene.Scene) -> tuple[bytes, bytes]:
    """The scene's JPEG file (quality 90, 4:2:0) and its mask's PNG file."""
    stream = io.BytesIO()
    Image.fromarray(drawn.pixels).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return stream.getvalue(), masks.encode(drawn.mask)


def draw_missing(job: Job, first: int, step: int, done: Callable[[int], None]) -> None:
    """Draw those of the samples first, first + step, ... that are not there yet; `done` is told how many were seen."""
    folder = Path(job.folder)
    names = list(objects.OBJECTS)
    for label in range(min(job.classes, job.count)):
        for kind in (folder, folder / "masks"):
            (kind / job.split / names[label]).mkdir(parents=True, exist_ok=True)
    mine = range(first, job.count, step)
    for start in range(0, len(mine), _BATCH):
        batch = mine[start : start + _BATCH]
        missing = [sample for sample in batch if not is_there(folder, job.stem(sample))]
        for sample, numbers in zip(missing, scene.numbers(job.seed, job.split, np.array(missing)), strict=True):
            jpeg, png = encode(scene.draw(names[job.label(sample)], job.size, numbers))
            _write(folder / "masks" / f"{job.stem(sample)}.png", png)
            _write(folder / f"{job.stem(sample)}.jpg", jpeg)
        done(len(batch))


def draw_all(job: Job, done: Callable[[int], None]) -> None:
    """Draw all missing samples, in a process for each core, up to eight; `done` is told how many were seen.

    Raises:
        DataError: the folder cannot be written, or a process died.
    """
    try:
        if job.count < _WORTH_PROCESSES:
            draw_missing(job, 0, 1, done)
            return
    except OSError as error:
        raise DataError(
            f"{job.folder}: cannot draw the demo images here ({error.strerror}); make room or allow it"
        ) from None
    # A command of its own rather than multiprocessing: that would run the caller's main module again.
    workers = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    package = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    running = []
    told = threading.Lock()
    readers = []
    try:
        for worker in range(workers):
            task = json.dumps({"job": asdict(job), "first": worker, "step": workers})
            command = [sys.executable, "-m", "pipelines.drawing.files", task]
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            running.append(process)
            readers.append(threading.Thread(target=_follow, args=(process, told, done), daemon=True))
            readers[-1].start()
        for process, reader in zip(running, readers, strict=True):
            reader.join()
            complaint = process.stderr.read().strip() if process.stderr else ""
            if process.wait() != 0:
                reason = complaint.splitlines()[-1] if complaint else f"a process ended with code {process.returncode}"
                raise DataError(f"{job.folder}: cannot draw the demo images here: {reason}; start again to go on")
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def is_there(folder: Path, stem: str) -> bool:
    """Whether a sample's image and mask are there and not empty (as a file may be after a power cut)."""
    with contextlib.suppress(OSError):
        return bool((folder / f"{stem}.jpg").stat().st_size and (folder / "masks" / f"{stem}.png").stat().st_size)
    return False


def _follow(process: "subprocess.Popen[str]", told: threading.Lock, done: Callable[[int], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with told:
            done(int(line))


def _write(path: Path, content: bytes) -> None:
    # Flushing each to the disk would take longer than drawing; `is_there` finds what a power cut emptied.
    with cache.replacing(path, durable=False) as partial:
        partial.write_bytes(content)


def main(argument: str) -> None:
    """Draw one process's share, printing a number for each batch."""
    task = json.loads(argument)
    draw_missing(Job(**task["job"]), task["first"], task["step"], lambda amount: print(amount, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
