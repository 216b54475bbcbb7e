"""What this machine can do, and how to mend what it cannot: `lorot doctor`.

What loads foreign native code (torch, DALI) is tried in a process of its own, so that a crash there is a finding.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.amounts import shown_bytes
from service import machine, store
from service.errors import LorotError

_TIMEOUT_S = 600
_MIN_MEMORY_BYTES = 4_000_000_000
_MIN_DISK_BYTES = 5_000_000_000
# Workers hand batches to one another and NCCL its buffers through it; Docker's default of 64 MB is too little.
_MIN_SHM_BYTES = 512_000_000

_STATES = {"ok": "[green]ok[/]", "limited": "[yellow]limited[/]", "missing": "[red]missing[/]"}

_GPUS = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU")
for index in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(index)
    precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    print(f"{card.name}, {card.total_memory / 1e9:.0f} GB, {precision}")
"""

_COLLECTIVES = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
tensor = torch.ones(3)
dist.all_reduce(tensor)
assert tensor.sum() == 3
nccl = dist.is_nccl_available()
print("gloo works" + (", NCCL " + ".".join(map(str, torch.cuda.nccl.version())) if nccl else ", no NCCL"), flush=True)
# The interpreter's end may abort (service.training.distributed.leave).
os._exit(0)
"""

_PIPELINE = """
import sys
from pipelines import datasets, loading, pretext
from pipelines.plan import View
manifest = datasets.load("demo", sys.argv[1], "train", train_count=20, val_count=10, size=48)
view = View(
    size=32, crop="random_resized", scale=(0.5, 1.0), ratio=(0.75, 1.33), padding=0, flip=True, eval_crop=0.875,
    mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
)
source = loading.Source(manifest, view, pretext.load("lorot_e"), seed=0)
with loading.open_train(sys.argv[2], source, start_step=0, stop_step=1, global_batch=8, micro_batch=8) as batches:
    batch = next(iter(batches))
assert tuple(batch.images.shape) == (8, 3, 32, 32)
print("decodes, crops, turns and normalises")
"""


@dataclass(frozen=True)
class Finding:
    """One thing a job may need. `state` is ok, limited or missing; `fix` says what to do about it."""

    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = False


def examine(tracking_uri: str | None = None) -> list[Finding]:
    """Try everything; takes some seconds and leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="lorot-doctor-") as scratch:
        probes: list[Callable[[], Finding]] = [
            _python,
            _cores,
            _memory,
            _disk,
            _shared_memory,
            _gpu,
            lambda: _dali(scratch),
            lambda: _torch_loader(scratch),
            _collectives,
            _compiler,
            lambda: _tracking(tracking_uri),
        ]
        with ThreadPoolExecutor(min(4, machine.cores())) as pool:
            return list(pool.map(lambda probe: probe(), probes))


def fails(findings: Sequence[Finding]) -> bool:
    """Whether something is missing that every job needs."""
    return any(finding.required and finding.state == "missing" for finding in findings)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table, with what to do below each that is not well."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("what", "state", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        fix = f"\nfix: {finding.fix}" if finding.fix and finding.state != "ok" else ""
        table.add_row(finding.name, _STATES[finding.state], escape(f"{finding.detail}{fix}"))
    console.print(table, highlight=False)
    if fails(findings):
        console.print("[red]Training does not work here yet[/]; see the fixes above.")
    else:
        console.print("Training works here; `lorot quickstart` shows it.")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", "ok", f"{version} at {sys.prefix}", required=True)


def _cores() -> Finding:
    count = machine.cores()
    fix = "training runs, slowly; give the container more CPUs"
    return Finding("CPU", "ok" if count > 1 else "limited", f"{count} cores", fix)


def _memory() -> Finding:
    size = machine.memory_bytes()
    fix = "use a smaller micro_batch and one worker, or give the container more memory"
    return Finding("memory", "ok" if size >= _MIN_MEMORY_BYTES else "limited", shown_bytes(size), fix)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    state = "ok" if free >= _MIN_DISK_BYTES else "limited"
    if not os.access(".", os.W_OK):
        return Finding(
            "disk", "missing", f"{Path.cwd()} is read-only", "work in a folder you may write to", required=True
        )
    return Finding(
        "disk", state, f"{shown_bytes(free)} free in {Path.cwd()}", "free some, or put output= on another disk"
    )


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Finding("/dev/shm", "limited", "not there", "run the container with --shm-size 8g")
    size = shutil.disk_usage(folder).total
    state = "ok" if size >= _MIN_SHM_BYTES else "limited"
    return Finding("/dev/shm", state, shown_bytes(size), "run the container with --shm-size 8g")


def _gpu() -> Finding:
    well, said = _try(_GPUS)
    if well:
        return Finding("GPU", "ok", said)
    fix = "none is needed for small jobs; otherwise install NVIDIA's driver, and run containers with --gpus all"
    return Finding("GPU", "limited", said, fix)


def _dali(scratch: str) -> Finding:
    version = _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120")
    if version is None:
        fix = 'pip install "lorot[cu13]" (lorot[cu12] for a torch of CUDA 12), or data.loader=torch'
        return Finding("DALI", "missing", "not installed", fix, required=True)
    if _version("nvidia-dali-cuda130") and _version("nvidia-dali-cuda120"):
        detail = "both CUDA flavours are installed; they overwrite each other's files"
        fix = "pip uninstall both, then install the one that fits torch: lorot[cu13] or lorot[cu12]"
        return Finding("DALI", "missing", detail, fix, required=True)
    well, said = _try(_PIPELINE, scratch, "dali")
    fix = "reinstall nvidia-dali for torch's CUDA version, or use data.loader=torch"
    return Finding("DALI", "ok" if well else "missing", f"{version}, {said}", fix, required=True)


def _torch_loader(scratch: str) -> Finding:
    well, said = _try(_PIPELINE, scratch, "torch")
    return Finding("torch loader", "ok" if well else "missing", said, "reinstall torch and pillow", required=True)


def _collectives() -> Finding:
    well, said = _try(_COLLECTIVES)
    fix = "workers meet over the loopback interface; reinstall torch, or allow it in the container"
    return Finding("gloo, NCCL", "ok" if well else "missing", said, fix, required=True)


def _compiler() -> Finding:
    wanted = os.environ.get("CXX", "c++")
    compiler = shutil.which(wanted) or shutil.which("g++")
    # DeepSpeed's wheel brings ninja along, beside the interpreter.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    lacking = [name for name, found in ((wanted, compiler), ("ninja", ninja)) if found is None]
    version = _version("deepspeed")
    if version is None:
        return Finding("DeepSpeed", "missing", "not installed", "pip install lorot", required=True)
    if lacking:
        # Training takes torch's optimizers and leaves DeepSpeed's shared-memory operator out.
        fix = (
            "only for operators that `deepspeed:` may ask for, as offloading does (Debian: apt install g++ ninja-build)"
        )
        return Finding("DeepSpeed", "limited", f"{version}, without {' and '.join(lacking)}", fix, required=True)
    return Finding("DeepSpeed", "ok", f"{version}, builds with {compiler} and {ninja}", required=True)


def _tracking(uri: str | None) -> Finding:
    place = uri or store.default_uri()
    path = store.sqlite_path(place)
    if path is not None and not path.exists():
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not os.access(folder, os.W_OK):
            return Finding("MLflow", "missing", f"{folder} is read-only", "set MLFLOW_TRACKING_URI", required=True)
        return Finding("MLflow", "ok", f"{_version('mlflow')}, will record in {store.shown(place)}", required=True)
    try:
        store.ensure_ready(place)
    except LorotError as error:
        return Finding("MLflow", "missing", str(error), "see above", required=True)
    return Finding("MLflow", "ok", f"{_version('mlflow')}, records in {store.shown(place)}", required=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try(program: str, *arguments: str) -> tuple[bool, str]:
    """Run a Python program of its own; returns whether it ended well, and its output or the last line of its error."""
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, f"gave no answer within {_TIMEOUT_S} s"
    if done.returncode == 0:
        return True, done.stdout.strip()
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return False, said[-1] if said else f"ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
