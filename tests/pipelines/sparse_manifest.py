"""A manifest of a billion samples that takes next to no disk: a real file, whose columns are holes until written to."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import manifest
from pipelines.manifest import Heading

COLUMNS = {
    "label": np.int64,
    "height": np.int64,
    "width": np.int64,
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
}
# Buffers from here on are holes: the columns, of which every value is 0.
_COLUMN_BYTES = 1 << 22


class _HoleyFile:
    """A file that leaves a hole where a column is written."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        if size >= _COLUMN_BYTES:
            self._file.seek(size, 1)
        else:
            self._file.write(content)
        return size

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
        self._file.close()


def write(path: Path, heading: Heading, count: int, rows: Mapping[int, Mapping[str, int]]) -> None:
    """Write a manifest of `count` samples in shards; all columns are 0 but in the given rows."""
    # Zeros that nobody touches take no memory either.
    columns = {name: pa.array(np.zeros(count, kind)) for name, kind in COLUMNS.items()}
    batch = pa.RecordBatch.from_pydict(columns)
    about = json.dumps({"format": manifest.FORMAT, **asdict(heading)})
    batch = batch.replace_schema_metadata({b"lorot.manifest": about.encode()})
    sink = _HoleyFile(path)
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
        writer.write_batch(batch)
    sink.close()
    del batch, columns
    mapped = pa.memory_map(str(path))
    found = pa.ipc.open_file(mapped).get_batch(0)
    mapped.seek(0)
    base = mapped.read_buffer(8).address
    with path.open("r+b") as file:
        for name, kind in COLUMNS.items():
            start = found.column(name).buffers()[1].address - base
            for row, values in rows.items():
                file.seek(start + row * np.dtype(kind).itemsize)
                file.write(kind(values.get(name, 0)).tobytes())
