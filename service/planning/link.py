"""What torchrun starts to measure the link between a machine's workers: `... -m service.planning.link BYTES FILE`."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from service.training import distributed

_ROUNDS = 9


def main(arguments: list[str] | None = None) -> int:
    """Average BYTES of float32 between the workers, and write {"bytes_per_s": ...} of each to FILE."""
    size, path = arguments if arguments is not None else sys.argv[1:]
    world = distributed.connect("auto")
    # As the gradients travel: in buckets, one after the other.
    buckets = torch.zeros(max(1, int(size) // 4), device=world.device).split(2_000_000)
    seconds = []
    for _ in range(_ROUNDS):
        distributed.barrier()
        began = time.perf_counter()
        for bucket in buckets:
            distributed.all_sum(bucket)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    moved = 2 * (world.size - 1) / world.size * int(size)
    if world.is_main:
        Path(path).write_text(json.dumps({"bytes_per_s": moved / statistics.median(seconds)}))
    distributed.barrier()
    distributed.disconnect()
    return 0


if __name__ == "__main__":
    distributed.leave(main())
