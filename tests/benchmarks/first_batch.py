"""From the start of a process to its first batch, imports included: ours beside torchvision's DataLoader.

    python -m tests.benchmarks.first_batch [--images 2000] [--rounds 3]

Both load batches of 64 from class folders of 500 x 375 JPEGs: RandomResizedCrop 224, flip, normalise. Ours finds its
manifest and its compiled kernels where an earlier start left them; its parts add up to the whole.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines import datasets
from tests.benchmarks import photographs

OURS = """
import json, sys, time
began, laps = time.perf_counter(), {}
def lap(name):
    global began
    now = time.perf_counter()
    laps[name], began = now - began, now
import numpy
import pyarrow
lap("import numpy, pyarrow")
import torch
lap("import torch")
from pipelines import datasets, loading, pretext
from pipelines.plan import View
lap("import pipelines")
import nvidia.dali
lap("import nvidia.dali")
import pipelines.dali.host_graph
lap("import numba, load the kernels")
if sys.argv[2]:
    from pipelines.manifest import Manifest
    manifest = Manifest.open(sys.argv[2], sys.argv[1])
else:
    manifest = datasets.load("folder", sys.argv[1], "train")
lap("open the manifest")
source = loading.Source(manifest, View(224), pretext.load("lorot_e"), 0)
batches = loading.open_train("dali", source, start_step=0, stop_step=50, global_batch=64, micro_batch=64)
lap("build the pipeline")
batch = next(batches)
assert batch.images.shape == (64, 3, 224, 224)
lap("first batch")
print(json.dumps(laps), flush=True)
import os; os._exit(0)
"""

THEIRS = """
import json, sys, time
began, laps = time.perf_counter(), {}
import torch, torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2
if __name__ == "__main__":
    laps["import torch, torchvision"] = time.perf_counter() - began
    began = time.perf_counter()
    parts = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    view = v2.Compose([*parts, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = torchvision.datasets.ImageFolder(sys.argv[1] + "/train", view)
    laps["list the files"] = time.perf_counter() - began
    began = time.perf_counter()
    batch, _ = next(iter(DataLoader(images, 64, shuffle=True, num_workers=2)))
    assert batch.shape == (64, 3, 224, 224)
    laps["first batch, two workers"] = time.perf_counter() - began
    print(json.dumps(laps), flush=True)
    import os; os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        for number, path in enumerate(photographs.write(root / "all", given.images)):
            folder = root / f"train/class{number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)
        manifest = str(datasets.load("folder", root, "train").path)
        programs = {
            "ours": (OURS, manifest),
            "ours, looking at the files": (OURS, ""),
            "torchvision, 2 workers": (THEIRS, ""),
        }
        # What is compiled or cached once is so before anything is measured.
        measure(OURS, root, manifest)
        laps: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        for _ in range(given.rounds):
            for name, (program, argument) in programs.items():
                laps[name].append(measure(program, root, argument))
        for name, own in laps.items():
            print(name)
            for part in own[0]:
                values = [lap[part] for lap in own]
                print(f"  {part:36} {statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f})")
    finally:
        shutil.rmtree(root)


def measure(program: str, root: Path, manifest: str) -> dict[str, float]:
    """Seconds of each part, of the whole, and of processor time in all."""
    before = os.times()
    line = [sys.executable, "-c", program, str(root), manifest]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    after = os.times()
    laps: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    used = sum(after[2:4]) - sum(before[2:4])
    return laps | {"whole process, seconds": after.elapsed - before.elapsed, "processor seconds": used}


if __name__ == "__main__":
    main()
