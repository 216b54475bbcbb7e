"""A baseline, LoRot-I and LoRot-E on drawn objects, three seeds each, compared in everything; for two CPU cores.

    python -m tests.benchmarks.compare_demo [--seeds 0 1 2] [--output runs/compare_demo]

1. Classifiers: configs/quickstart.yaml with few images and all twelve classes, so that the task is not solved by any.
2. Scenes: `lorot data demo-coco`.
3. `lorot compare models:/... --jobs wsol,detect,segment`: localization by both protocols, RetinaNet and SOLOv2 on each.

Everything is recorded in OUTPUT/mlflow.db. What is done is not done again: started anew, it goes on where it was. The
table and the figures are in OUTPUT/comparison.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

METHODS = {"none": "supervised", "lorot_i": "multi_task", "lorot_e": "multi_task"}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# On two cores about 40 s a run, half of them the start of two workers.
CLASSIFIER = (
    "data.options={train_count: 2400, val_count: 1200, size: 96, classes: 12}",
    "duration=8 epochs",
    "evaluate_every=8 epochs",
    "checkpoint.every=8 epochs",
)
SCENES = ("train_count=240", "val_count=120", "size=128", "classes=6", "most=4")


def lorot(*arguments: str) -> int:
    """Run the command; its output is this program's. Returns its exit code."""
    return subprocess.run([sys.executable, "-m", "service.cli", *arguments], check=False).returncode


def classifier(pretext: str, seed: int, output: Path, uri: str) -> str:
    """Train one, unless it is there; returns its address."""
    name = f"{pretext}-seed{seed}"
    folder = output / name
    if not (folder / "summary.json").exists():
        values = [f"name={name}", f"seed={seed}", f"output={output}", f"tracking.uri={uri}", f"data.root={output}/demo"]
        method = [f"pretext.name={pretext}", f"objective.name={METHODS[pretext]}", "registry.name=compared"]
        go_on = ["--resume"] if any((folder / "checkpoints").glob("step-*")) else []
        line = [*CLASSIFIER, *values, *method, *go_on]
        if code := lorot("train", str(CONFIGS / "quickstart.yaml"), *line):
            raise SystemExit(code)
    return f"models:/compared/{json.loads((folder / 'summary.json').read_text())['model_version']}"


def lengths(job: str, steps: int) -> list[str]:
    """Of a detector's training: evaluated and kept at its end."""
    values = {"duration": steps, "evaluate_every": steps, "checkpoint.every": steps, "schedule.warmup": steps // 8}
    return [f"{job}.{key}={value} steps" for key, value in values.items()]


def main() -> int:
    """The whole chain; returns the exit code of `lorot compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/compare_demo"))
    # RetinaNet's heads start so slowly that after 160 steps nearly nothing is found.
    parser.add_argument("--detect-steps", type=int, default=480, help="of RetinaNet's training")
    parser.add_argument("--segment-steps", type=int, default=160, help="of SOLOv2's")
    given = parser.parse_args()
    began = time.perf_counter()
    output = given.output.resolve()
    uri = f"sqlite:///{output}/mlflow.db"
    output.mkdir(parents=True, exist_ok=True)
    models = [classifier(pretext, seed, output, uri) for seed in given.seeds for pretext in METHODS]
    trained = time.perf_counter()
    if code := lorot("data", "demo-coco", str(output / "scenes"), *SCENES):
        return code
    code = lorot(
        "compare",
        *models,
        "--jobs=wsol,detect,segment",
        f"--config=detect={CONFIGS}/downstream/demo-retinanet.yaml",
        f"--config=segment={CONFIGS}/downstream/demo-solov2.yaml",
        f"--root={output}/scenes",
        f"--output={output}/comparison",
        f"--tracking-uri={uri}",
        f"output={output}",
        *lengths("detect", given.detect_steps),
        *lengths("segment", given.segment_steps),
    )
    ended = time.perf_counter()
    print(f"classifiers {trained - began:.0f} s, comparison {ended - trained:.0f} s, in all {ended - began:.0f} s")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
