"""Which samples each worker was given, step by step: what proves that none is skipped or repeated.

    samples-rank0.jsonl     {"attempt": ..., "step": 1, "ids": [[7, 3], [12, 0]]}    a list per micro-batch

A run that was killed or went back does steps again. Of each step the latest attempt counts; attempts sort by name.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from service.training import distributed
from service.training.distributed import World
from service.training.task import Samples

PATTERN = "samples-rank*.jsonl"


def logged(
    batches: Iterator[Samples], folder: Path, world: World, first_step: int, accumulation: int
) -> Iterator[Samples]:
    """The same batches; the ids of a step's are on the disk before the step is made. All workers call it."""
    attempt = distributed.from_main(f"{time.time_ns():020d}" if world.is_main else "", world.device)
    return _logged(batches, folder / f"samples-rank{world.rank}.jsonl", attempt, first_step, accumulation)


def _logged(
    batches: Iterator[Samples], path: Path, attempt: str, first_step: int, accumulation: int
) -> Iterator[Samples]:
    ids: list[list[int]] = []
    step = first_step + 1
    with path.open("a+b") as end:
        # A worker that was killed, or a full disk, may have cut the last line short.
        if end.tell() and (end.seek(-1, os.SEEK_END), end.read())[1] != b"\n":
            end.write(b"\n")
    with path.open("a") as file:
        for batch in batches:
            ids.append(batch.ids.tolist())
            if len(ids) == accumulation:
                file.write(json.dumps({"attempt": attempt, "step": step, "ids": ids}) + "\n")
                file.flush()
                ids, step = [], step + 1
            yield batch
