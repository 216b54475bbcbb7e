"""No loader: what the cores could do. `limit.c` on threads, on files that lie in memory."""

import ctypes
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks.data.loaders import Job, Row, files

FOREIGN = False
_MODES = {"entropy": 0, "decode": 1, "plain": 2, "tuned": 3}
_SOURCE = Path(__file__).parents[1] / "limit.c"
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

ROWS = (
    Row("limit_entropy", "limit: Huffman decoding alone", options={"mode": "entropy"}, renders=False),
    Row("limit_decode", "limit: window decoding in C", options={"mode": "decode"}, renders=False),
    Row("limit_plain", "limit: the whole job in plain C", options={"mode": "plain"}),
    Row("limit_tuned", "limit: the whole job in C, resizing across in registers", options={"mode": "tuned"}),
    Row("limit_plain_256", "limit: plain C, short side 256", "files256", {"mode": "plain"}, stored="256"),
    Row("limit_tuned_256", "limit: tuned C, short side 256", "files256", {"mode": "tuned"}, stored="256"),
)


def batches(row: Row, folder: Path, job: Job) -> Iterator[np.ndarray]:
    """Without `job.check` the results stay in the processor's cache, and what comes out has the right shape only."""
    library = ctypes.CDLL(str(compiled(folder.parent)))
    encoded = [path.read_bytes() for path in files(folder)]
    contents = (ctypes.c_char_p * len(encoded))(*encoded)
    sizes = np.array([len(file) for file in encoded], np.uint64)
    images = np.zeros((job.batch if job.check else 1, job.size, job.size, 3), np.float32)
    rng = np.random.default_rng(job.seed)
    count = 0
    while True:
        order = rng.permutation(len(encoded))
        for first in range(0, len(order) - job.batch + 1, job.batch):
            chosen = np.ascontiguousarray(order[first : first + job.batch])
            failed = library.run(
                contents,
                sizes.ctypes.data_as(ctypes.c_void_p),
                chosen.ctypes.data_as(ctypes.c_void_p),
                job.batch,
                _MODES[row.options["mode"]],
                job.size,
                images.ctypes.data_as(ctypes.c_void_p) if job.check else None,
                ctypes.c_uint64(job.seed + count * job.batch),
                job.cores,
            )
            assert not failed, f"limit.c has no room for {job}"
            count += 1
            yield np.broadcast_to(images, (job.batch, *images.shape[1:])).transpose(0, 3, 1, 2)


def compiled(folder: Path) -> Path:
    """The shared library, compiled anew when the source has changed; raises RuntimeError with the compiler's words."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    path = folder / f"limit-{digest}.so"
    if not path.exists():
        partial = path.with_suffix(".partial")
        line = ["cc", *_FLAGS, str(_SOURCE), "-o", str(partial), "-ljpeg", "-lm", "-lpthread"]
        try:
            subprocess.run(line, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("no C compiler `cc`; Debian: apt-get install gcc libjpeg-dev") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"limit.c: {error.stderr.strip()[-500:]} (Debian: libjpeg-dev)") from None
        partial.rename(path)
    return path
