"""A few samples of a data set, prepared: in this process, or in as many others as there are cores.

Run as `python -P -m pipelines.pieces JOB`, a process says that it is ready, reads lines `FIRST STOP` and answers each
with a line of JSON and the bytes that it announces, until its input ends: so it ends with its parent, whatever becomes
of that. A command of its own rather than multiprocessing, which would run the caller's main module again and unpickle
what it is sent.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

from pipelines import masks, shards
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.resizing import Recipe, prepare_boxes, prepare_file, prepare_mask, prepare_pixels
from pipelines.shards import Place
from pipelines.soundness import UnsoundError

# Samples handed to a process at once: enough to make the handing over cheap, few enough to hold in memory.
_PIECE = 16
# The working directory is none of the places where the process finds its modules.
_COMMAND = (sys.executable, "-P", "-m", "pipelines.pieces")
_READY = b"ready\n"
# So many samples are done sooner here than a process starts.
_WORTH_PROCESSES = 64


@dataclass(frozen=True)
class Job:
    """What a process has to know.

    Attributes:
        manifest, root: where `Manifest.open` finds the source.
        recipe: what becomes of an image.
    """

    manifest: str
    root: str
    recipe: Recipe


class Sample(NamedTuple):
    """What became of one sample of the source.

    Attributes:
        id: its row in the source's manifest.
        reason: why it could not be read, in which case the rest is empty; "" otherwise.
        size: bytes that it takes in the shard.
        places: ending -> where its members lie, counted from the sample's start.
        height, width: of the prepared image.
        source_bytes: of the encoded image (or pixels) it was made from.
        checksum: `shards.checksum` of image and mask.
        boxes: (x_min, y_min, x_max, y_max) in prepared pixels.
    """

    id: int
    reason: str
    size: int = 0
    places: dict[str, Place] = {}  # noqa: RUF012
    height: int = 0
    width: int = 0
    source_bytes: int = 0
    checksum: int = 0
    boxes: list[list[float]] = []  # noqa: RUF012


class Piece(NamedTuple):
    """Samples in order, and their bytes in the shard one after another."""

    samples: list[Sample]
    content: bytes


def key(sample: int) -> str:
    """The name of a sample's members: the row of the source, so that it says where it comes from."""
    return f"{sample:09d}"


def make(manifest: Manifest, recipe: Recipe, first: int, stop: int) -> Piece:
    """Prepare samples first to stop - 1."""
    made = [_make(manifest, recipe, sample) for sample in range(first, stop)]
    return Piece([sample for sample, _ in made], b"".join(content for _, content in made))


def make_all(manifest: Manifest, recipe: Recipe, first: int, stop: int, workers: int) -> Iterator[Piece]:
    """Prepare samples first to stop - 1, in order, in so many processes.

    A decoder that dies of an image takes its process with it: that sample's reason says so.

    Raises:
        DataError: a process cannot be started.
    """
    starts = range(first, stop, _PIECE)
    if stop - first <= _WORTH_PROCESSES:
        for start in starts:
            yield make(manifest, recipe, start, min(start + _PIECE, stop))
        return
    job = json.dumps(asdict(Job(str(manifest.path), str(manifest.root), recipe)))
    workers = min(workers, len(starts))
    pool = _Processes(job)
    waiting: deque[Future[Piece]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for start in starts:
                # Twice as many as can be worked on, so that nobody waits while the oldest one is written.
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
                waiting.append(threads.submit(pool.make, start, min(start + _PIECE, stop)))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            pool.close()


class _DiedError(Exception):
    """A process died while it prepared samples; the message says of what."""


class _Process(NamedTuple):
    """A process that makes pieces, and what it complains of."""

    handle: "subprocess.Popen[bytes]"
    complaints: IO[bytes]


class _Processes:
    """One process for each thread that asks."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._own = threading.local()
        self._starting = threading.Lock()
        self._closed = False
        self._started: list[_Process] = []

    def make(self, first: int, stop: int) -> Piece:
        """Prepare samples first to stop - 1; if the process dies of it, each in one of its own, to see which did it."""
        process: _Process | None = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        try:
            return self._ask(process, first, stop)
        except _DiedError:
            self._own.process = None
            self._end(process)
        alone = [self._make_alone(sample) for sample in range(first, stop)]
        samples = [sample for piece in alone for sample in piece.samples]
        return Piece(samples, b"".join(piece.content for piece in alone))

    def _make_alone(self, sample: int) -> Piece:
        process = self._start()
        try:
            return self._ask(process, sample, sample + 1)
        except _DiedError as death:
            return Piece([Sample(sample, f"the process that prepared it died: {death}")], b"")
        finally:
            self._end(process)

    def _ask(self, process: _Process, first: int, stop: int) -> Piece:
        requests, answers = process.handle.stdin, process.handle.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(f"{first} {stop}\n".encode())
            requests.flush()
            about = json.loads(answers.readline())
            content = answers.read(about["bytes"])
        except (OSError, ValueError):
            raise _DiedError(_complaint(process)) from None
        if len(content) != about["bytes"]:
            raise _DiedError(_complaint(process))
        return Piece([_parse(values) for values in about["samples"]], content)

    def close(self) -> None:
        """End them all."""
        with self._starting:
            self._closed = True
            left = list(self._started)
        for process in left:
            process.handle.kill()
        for process in left:
            self._end(process)

    def _end(self, process: _Process) -> None:
        process.handle.kill()
        process.handle.wait()
        for stream in (process.handle.stdin, process.handle.stdout, process.complaints):
            # What a dead process will not read cannot be flushed.
            with contextlib.suppress(OSError):
                stream and stream.close()
        with self._starting, contextlib.suppress(ValueError):
            self._started.remove(process)

    def _start(self) -> _Process:
        package = str(Path(__file__).resolve().parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            **dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            # One image after another in the same memory; otherwise each is given back, and taken again page by page.
            **dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30)),
        }
        # A file, since nobody reads a pipe meanwhile, and a full one would stop the process.
        complaints = tempfile.TemporaryFile()  # noqa: SIM115
        with self._starting:
            if self._closed:
                raise DataError("no more images are prepared")
            handle = subprocess.Popen(
                [*_COMMAND, self._job],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                # Ctrl-C is for the parent, which ends them.
                start_new_session=True,
            )
            process = _Process(handle, complaints)
            self._started.append(process)
        assert handle.stdout is not None
        if handle.stdout.readline() != _READY:
            complaint = _complaint(process)
            raise DataError(f"no process that prepares images can be started: {complaint}; what is finished stays")
        return process


def _make(manifest: Manifest, recipe: Recipe, sample: int) -> tuple[Sample, bytes]:
    height, width = int(manifest.heights[sample]), int(manifest.widths[sample])
    try:
        source = manifest.read(sample)
        if isinstance(source, bytes):
            picture, source_bytes = prepare_file(source, height, width, recipe), len(source)
        else:
            picture, source_bytes = prepare_pixels(source, recipe), source.nbytes
        mask = manifest.mask(sample) if manifest.has_masks else None
    except (UnsoundError, DataError) as error:
        return Sample(sample, str(error)), b""
    size = picture.height, picture.width
    members = {picture.ending: picture.content, "cls": str(int(manifest.labels[sample])).encode()}
    boxes: list[list[float]] = []
    if manifest.has_boxes:
        boxes = prepare_boxes(manifest.boxes(sample), (height, width), size).tolist()
        about = {"boxes": boxes, "height": size[0], "width": size[1], "source": manifest.source_path(sample)}
        members["json"] = json.dumps(about, separators=(",", ":")).encode()
    mask_file = b"" if mask is None else masks.encode(prepare_mask(mask, *size))
    if mask_file:
        members["mask.png"] = mask_file
    content, places = shards.entry(key(sample), members)
    checksum = shards.checksum(picture.content, mask_file)
    return Sample(sample, "", len(content), places, *size, source_bytes, checksum, boxes), content


def _parse(values: list[object]) -> Sample:
    sample = Sample(*values)  # type: ignore[arg-type]
    return sample._replace(places={ending: Place(*place) for ending, place in sample.places.items()})


def _complaint(process: _Process) -> str:
    """Why a process died; ends it if it has not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        # Its output ends a little before it does.
        process.handle.wait(timeout=5)
    process.handle.kill()
    code = process.handle.wait()
    process.complaints.seek(0)
    complaint = process.complaints.read().decode(errors="replace").strip()
    with contextlib.suppress(ValueError):
        hint = "; is there enough memory?" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return complaint.splitlines()[-1] if complaint else f"it ended with code {code}"


def main(text: str) -> None:
    """Answer requests on the standard input until it ends."""
    values = json.loads(text)
    job = Job(**values | {"recipe": Recipe(**values["recipe"])})
    manifest = Manifest.open(job.manifest, job.root)
    answers = sys.stdout.buffer
    # What is loaded by now stays; looking through it again and again for garbage took a twentieth of the time.
    gc.freeze()
    answers.write(_READY)
    answers.flush()
    for line in sys.stdin:
        piece = make(manifest, job.recipe, *map(int, line.split()))
        about = {"bytes": len(piece.content), "samples": piece.samples}
        answers.write(json.dumps(about).encode() + b"\n" + piece.content)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
