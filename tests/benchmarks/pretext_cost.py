"""What LoRot-E costs a whole training step: the same job with and without it, interleaved in one process.

    python -m tests.benchmarks.pretext_cost [--model resnet_small --size 64 --micro-batch 64 --steps 16 --rounds 21]

A round times `--steps` optimizer steps of each job, loader included (DALI decodes JPEGs and applies the plan), in
alternating order. The ratio is taken within a round; its median over the rounds is the figure, in wall time and in CPU
time of all threads, which is steadier on a shared machine. The paper reports 1.06.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from service import models
from service.config import ModelConfig, ObjectiveConfig
from service.training import objectives


class Job:
    """One training job, stepped on demand."""

    def __init__(self, task: str, objective: str, manifest: object, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.task = pretext.load(task)
        self.model = models.build(ModelConfig(name=arguments.model), 10, self.task.num_labels)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.config = ObjectiveConfig(name=objective)
        view = View(size=arguments.size)
        self.batches = loading.open_train(
            "dali",
            loading.Source(manifest, view, self.task, seed=0),
            start_step=0,
            stop_step=10**6,
            global_batch=arguments.micro_batch,
            micro_batch=arguments.micro_batch,
            rank=0,
            world_size=1,
            device="cpu",
            num_threads=1,
            prefetch=2,
        )

    def run(self, steps: int) -> tuple[float, float]:
        """Wall and CPU seconds for this many optimizer steps."""
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in itertools.islice(self.batches, steps):
            result = objectives.compute(self.model, batch, self.config)
            self.optimizer.zero_grad()
            result.losses["loss"].backward()
            self.optimizer.step()
        return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet_small")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        side = max(96, arguments.size)
        manifest = datasets.load("demo", Path(folder), "train", train_count=1000, val_count=10, size=side)
        baseline = Job("none", "supervised", manifest, arguments)
        lorot = Job("lorot_e", "multi_task", manifest, arguments)
        for job in (baseline, lorot):
            job.run(5)
        ratios: dict[str, list[float]] = {"wall": [], "CPU": []}
        rates = []
        for round_number in range(arguments.rounds):
            pair = (baseline, lorot) if round_number % 2 == 0 else (lorot, baseline)
            seconds = {job: job.run(arguments.steps) for job in pair}
            for clock, with_lorot, without in zip(ratios, seconds[lorot], seconds[baseline], strict=True):
                ratios[clock].append(with_lorot / without)
            rates.append(arguments.steps * arguments.micro_batch / seconds[baseline][0])
        for job in (baseline, lorot):
            job.batches.close()
    print(
        f"{arguments.model}, {arguments.size} px, micro-batch {arguments.micro_batch}, 1 thread: "
        f"{statistics.median(rates):.0f} images/s without a pretext task"
    )
    for clock, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  lorot_e / none, {clock} time: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
