"""The paper's variants side by side on Fashion-MNIST: the whole chain for each of them and each seed, then one table.

    python -m tests.benchmarks.variants [--seeds 0 1 2] [--output runs/variants]

Each job is `lorot train configs/train/fashion_mnist-VARIANT.yaml seed=S`, then `lorot wsol` on what it registered.
Jobs that are done are not run again. The table is Markdown: mean and standard deviation over the seeds, in per cent.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS = {"none": "no pretext task", "rot_mt": "Rot (MT)", "lorot_i": "LoRot-I", "lorot_e": "LoRot-E"}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"


def lorot(*arguments: str) -> None:
    """Run the command; its output is this program's."""
    subprocess.run([sys.executable, "-m", "service.cli", *arguments], check=True)


def result(variant: str, seed: int, output: Path) -> dict[str, float]:
    """Train and localize, unless that was done before; the figures as fractions."""
    name = f"fashion_mnist-{variant}-seed{seed}"
    folder = output / name
    if not (folder / "summary.json").exists():
        config = CONFIGS / f"fashion_mnist-{variant}.yaml"
        go_on = ["--resume"] if (folder / "checkpoints").exists() else []
        lorot("train", str(config), f"name={name}", f"seed={seed}", f"output={output}", *go_on)
    summary = json.loads((folder / "summary.json").read_text())
    if not (folder / "wsol" / "wsol.json").exists():
        model = f"models:/{summary['model_name']}/{summary['model_version']}"
        lorot("wsol", "--model", model, "--output", str(folder / "wsol"))
    scores: dict[str, Any] = json.loads((folder / "wsol" / "wsol.json").read_text())["scores"]
    return {
        "top-1": summary["metrics"]["val/top1"],
        "GT-known localization": scores["max_box_acc"],
        "best centre box": scores["centre_box_acc"],
        "seconds": summary["wall_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/variants"))
    arguments = parser.parse_args()
    found = {name: [] for name in VARIANTS}
    for seed in arguments.seeds:
        for variant in VARIANTS:
            found[variant].append(result(variant, seed, arguments.output))
    print("| | top-1, % | GT-known localization, % | best centre box, % | s a run |\n|---|---|---|---|---|")
    for variant, label in VARIANTS.items():
        cells = []
        for key in ("top-1", "GT-known localization", "best centre box"):
            values = [100 * run[key] for run in found[variant]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells.append(f"{statistics.median(run['seconds'] for run in found[variant]):.0f}")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
