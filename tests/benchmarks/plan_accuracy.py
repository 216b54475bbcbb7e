"""`lorot plan --measure` against what this machine then does, with one worker and with two.

    python -m tests.benchmarks.plan_accuracy [--rounds 3] [--config configs/quickstart.yaml] [KEY.SUB=VALUE ...]

A round measures a worker as `--measure` does, predicts, and then trains for real (`lorot train`, records and loader
included), for each number of workers in turn. The figure is predicted / measured images a second: the median step of
the training, without its first records.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from service import config
from service.planning import assembly, calibration

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each part and each training")
    given = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="lorot-accuracy-") as place:
        common = [f"output={place}/runs", f"tracking.uri=sqlite:///{place}/mlflow.db", "registry.name=''"]
        common += [f"duration={given.steps} steps", "tracking.log_every=5 steps", "checkpoint.every=null"]
        common += [f"evaluate_every={given.steps} steps", "tracking.system_metrics=false", *given.overrides]
        for number in range(given.rounds):
            for workers in (1, 2) if number % 2 else (2, 1):
                pair = predict(given, common, workers), train(given, common, workers, f"{workers}-{number}", place)
                found[workers].append(pair)
                print(
                    f"  round {number}, {workers} workers: {pair[0]:.1f} predicted, {pair[1]:.1f} measured", flush=True
                )
    for workers, pairs in found.items():
        ratios = [predicted / measured for predicted, measured in pairs]
        rate = statistics.median(measured for _, measured in pairs)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        middle = statistics.median(ratios)
        print(f"{workers} workers: predicted / measured {middle:.2f} ({spread}); {rate:.0f} images/s measured")


def predict(given: argparse.Namespace, overrides: list[str], workers: int) -> float:
    """Images/s that the plan says."""
    measured = calibration.measure(given.config, overrides, workers, steps=given.steps)
    job = config.load(given.config, overrides)
    return assembly.assemble(job, assembly.Wish(gpus=workers), measured).last.images_per_s


def train(given: argparse.Namespace, overrides: list[str], workers: int, name: str, place: str) -> float:
    """Images/s of a real training, by its median step."""
    line = [sys.executable, "-m", "service.cli", "train", given.config, *overrides, f"name=r{name}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*line, "--workers", str(workers)], check=True, env=env, stdout=subprocess.DEVNULL)
    lines = (Path(place) / "runs" / f"r{name}" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["train/step_time_p50_s"] for line in lines if "train/step_time_p50_s" in line]
    job = config.load(given.config, overrides)
    return job.global_batch / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
