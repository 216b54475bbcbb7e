"""How long a checkpoint keeps training waiting: written behind its back, beside written while it waits.

    python -m tests.benchmarks.checkpoint_stall [--rounds 7] [--micro-batch 4] [--device auto] [--no-ema]

ResNet-50 in the real engine with momentum and an average: 3 x 102 MB. Each round
saves once without waiting, trains on until it is written, and saves once with waiting. Times are medians; what counts
are the ratios: of the two, and of the waiting to the training between two saves at the default interval.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from service import config, models
from service.run_folder import RunFolder
from service.training import distributed
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.keeper import RunKeeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-ema", action="store_true")
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary folder")
    given = parser.parse_args()
    batch = {"global_batch": given.micro_batch, "micro_batch": given.micro_batch}
    job = config.resolve({"device": given.device, "ema": None if given.no_ema else {}, **batch})
    world = distributed.connect(job.device)
    model = models.build(job.model, 1000, 0)
    ema = Ema(model.to(world.device), job.ema.decay, job.ema.every) if job.ema is not None else None
    engine = Engine(job, model, world)
    images = torch.randn(given.micro_batch, 3, given.size, given.size, device=world.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(given.micro_batch, device=world.device)

    def settled() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        began = settled()
        engine.backward(torch.nn.functional.cross_entropy(engine(images).logits.float(), labels))
        engine.step(0.001)
        return settled() - began

    with tempfile.TemporaryDirectory(dir=given.folder, prefix="checkpoint-stall-") as place:
        none: Any = None
        keeper = RunKeeper(job, RunFolder(Path(place)), engine, ema, none, None, {}, dict)

        def save(number: int, wait: bool) -> float:
            began = settled()
            keeper.save(number, {}, wait=wait)
            return settled() - began

        step(), step()
        first = save(1, wait=True)
        alone, beside, behind, blocking, written = [], [], [], [], []
        for number in range(given.rounds):
            alone += [step(), step()]
            behind.append(save(2 * number + 2, wait=False))
            began = time.perf_counter()
            while keeper.is_writing():
                beside.append(step())
            written.append(time.perf_counter() - began)
            keeper.finish_writing()
            blocking.append(save(2 * number + 3, wait=True))
        size = sum(file.stat().st_size for file in Path(place).rglob("*.safetensors")) / job.checkpoint.keep_last
        keeper.close()
    engine.close()

    def told(values: list[float]) -> str:
        return f"{statistics.median(values):8.3f} s  ({min(values):.3f} to {max(values):.3f}, {len(values)} times)"

    stall, step_s = statistics.median(behind), statistics.median(alone)
    assert job.checkpoint.every_minutes is not None
    interval_s = 60 * job.checkpoint.every_minutes
    print(f"a checkpoint of {size / 1e6:.0f} MB, on {world.device.type}, {torch.get_num_threads()} threads")
    print(f"step of {given.micro_batch} images      {told(alone)}")
    print(f"the same while one is written {told(beside)}")
    print(f"save, training waits for      {told(behind)}")
    print(f"save, blocking                {told(blocking)}")
    print(f"first save, memory allocated  {first:8.3f} s, blocking")
    print(f"behind / blocking             {stall / statistics.median(blocking):8.3f}")
    print(f"one save / one step           {stall / step_s:8.3f}")
    print(f"share of a step, amortised    {stall / interval_s:8.3%} at a save every {interval_s:.0f} s")
    slower = statistics.median(beside) / step_s - 1
    total = (stall + max(0.0, slower) * statistics.median(written)) / interval_s
    print(f"the same with the slower steps{total:8.3%}, which are {slower:+.1%}")
    distributed.disconnect()


if __name__ == "__main__":
    main()
    distributed.leave()
