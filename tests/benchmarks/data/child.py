"""One loader in a process of its own: what `measure` starts. Prints one line of JSON.

python -m tests.benchmarks.data.child ROW FOLDER [--images 6144 --warm-up 1024 | --check]
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.data import loaders
from tests.benchmarks.data.loaders import Job


def cpu_s(process: psutil.Process) -> float:
    """User and system seconds of a process, its children, and those of theirs that have ended."""
    total = 0.0
    for own in (process, *process.children(recursive=True)):
        try:
            total += sum(own.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def timed(batches: Iterator[Any], job: Job, images: int, warm_up: int) -> dict[str, float]:
    """Rate and CPU time over `images` images, from one batch's arrival to another's, after `warm_up` images."""
    process = psutil.Process()
    next(batches)
    first_s = time.time() - process.create_time()
    for _ in range(max(1, warm_up // job.batch)):
        next(batches)
    count = max(1, images // job.batch)
    cpu, began = cpu_s(process), time.perf_counter()
    for batch in itertools.islice(batches, count):
        assert len(batch) == job.batch
    seconds, cpu = time.perf_counter() - began, cpu_s(process) - cpu
    done = count * job.batch
    return {"images": done, "images_per_s": done / seconds, "images_per_cpu_s": done / cpu, "first_batch_s": first_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=6144)
    parser.add_argument("--warm-up", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="describe the images instead of timing them")
    arguments = parser.parse_args()
    # Libraries print; the answer is to be alone on what was standard output.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    module_name, row, _ = loaders.available()[arguments.row]
    job = Job(batch=arguments.batch, cores=arguments.cores, check=arguments.check)
    batches = loaders.load(module_name).batches(row, arguments.folder, job)
    if arguments.check:
        # Only here: what is timed does not pay for SciPy's import.
        from tests.benchmarks.data import checks

        some = itertools.islice(batches, max(1, arguments.images // job.batch))
        result: dict[str, Any] = checks.describe(some)
    else:
        result = timed(batches, job, arguments.images, arguments.warm_up)
    print(json.dumps(result), file=answer, flush=True)
    # Whatever threads and processes the loader has left are the parent's to end.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
