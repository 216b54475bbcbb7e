"""Who may import whom, and what nobody may do. Held by reading the sources, and by importing them for real."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("service", "pipelines") for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# From the bottom up: a part imports pipelines, lower rows, and its own row where `AMONG_THEMSELVES` says so.
TIERS = (
    (
        *("errors", "data_wait", "duration", "machine", "provenance", "figures", "ownership", "pictures", "run_folder"),
        *("naming", "holder", "plain_files", "whole_file", "scratch_folder", "curves"),
    ),
    ("config_file", "config_fields", "explaining", "data_config", "training_config", "detection_config", "config"),
    (
        *("models", "store", "spool", "splits", "delivery", "bundle", "tracking", "resolution", "registry", "report"),
        *("registration", "recovery", "run_creation", "flavour", "lineage", "detector_bundle", "artifact_places"),
    ),
    ("downstream",),
    ("training", "jobs", "export", "importing", "serving"),
    ("check", "data", "doctor", "help", "inventory", "profile", "quickstart", "transfer"),
    ("planning", "comparison", "client", "operations", "api"),
    ("console",),
    ("commands",),
    ("cli",),
)
AMONG_THEMSELVES = (True, True, True, False, False, False, False, False, False, False)

# The only files and folders that may import these, at any depth of the code.
ONLY_IN = {
    "nvidia.dali": {"pipelines/dali/"},
    "numba": {"pipelines/kernels/"},
    "llvmlite": {"pipelines/kernels/"},
    "fsspec": {"pipelines/remote.py"},
    "faster_coco_eval": {"pipelines/run_lengths.py", "service/downstream/coco_scores.py"},
    "deepspeed": {"service/training/engine.py"},
    "timm": {"service/export/formats.py"},
    "onnxruntime": {"service/export/formats.py"},
    "docker": {f"service/jobs/backends/docker/{part}.py" for part in ("backend", "engine", "images")},
    "kubernetes": {"service/jobs/backends/kubernetes/cluster.py"},
    "mlflow": {
        *("service/store.py", "service/tracking.py", "service/delivery.py", "service/run_creation.py"),
        "service/serving.py",
    },
}

# What starts jobs, answers questions about them, or plans data: quick to start, and able to run where no torch is.
TORCH_FREE = (
    "service.cli",
    "service.config",
    "service.help",
    "service.flavour",
    "service.commands.asking",
    "service.commands.detect",
    "service.commands.demo_coco",
    "service.commands.travel",
    "service.transfer",
    "service.commands.compare",
    "service.commands.jobs",
    "service.commands.operations",
    "service.client",
    *(name_of(path) for path in sorted((ROOT / "service/jobs").rglob("*.py"))),
    *(name_of(path) for package in ("api", "console") for path in sorted((ROOT / f"service/{package}").rglob("*.py"))),
    *(name_of(path) for path in sorted((ROOT / "service/operations").rglob("*.py"))),
    "service.machine",
    "service.splits",
    "service.doctor",
    "service.check",
    "service.profile.command",
    "service.planning.assembly",
    "service.planning.calibration",
    "service.planning.command",
    "pipelines.order",
    "pipelines.plan",
    "pipelines.randomness",
    "pipelines.manifest",
    *(f"pipelines.datasets.{path.stem}" for path in sorted((ROOT / "pipelines/datasets").glob("[!_]*.py"))),
    *(f"pipelines.augment.{path.stem}" for path in sorted((ROOT / "pipelines/augment").glob("[!_]*.py"))),
    *(f"pipelines.pretext.{path.stem}" for path in sorted((ROOT / "pipelines/pretext").glob("[!_]*.py"))),
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


MODULES = {name_of(path) for path in FILES}


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that the code below `node` imports, functions included, submodules told from attributes."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            yield from (alias.name for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "relative imports hide who imports whom"
            for alias in inner.names:
                dotted = f"{inner.module}.{alias.name}"
                yield dotted if dotted in MODULES or inner.module == "nvidia" else str(inner.module)


def imported_when_loaded(path: Path) -> set[str]:
    """What importing the file imports at once: not inside functions, not for the type checker alone."""
    found = set()
    for statement in tree(path).body:
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If):
            found.update(imports(statement))
    return found


def tier(module: str) -> int:
    part = module.split(".")[1]
    row = next((index for index, row in enumerate(TIERS) if part in row), None)
    assert row is not None, f"service.{part} is in no row of TIERS; say there who may import it"
    return row


def test_pipelines_never_import_the_service() -> None:
    found = [
        (path.name, name)
        for path in FILES
        if name_of(path).startswith("pipelines")
        for name in imports(tree(path))
        if name.split(".")[0] == "service"
    ]
    assert found == []


def test_parts_of_the_service_import_only_what_lies_below_them() -> None:
    found = []
    for path in FILES:
        own = name_of(path)
        if own == "service" or not own.startswith("service."):
            continue
        for other in imports(tree(path)):
            if not other.startswith("service.") or other.split(".")[1] == own.split(".")[1]:
                continue
            here, there = tier(own), tier(other)
            if there > here or (there == here and not AMONG_THEMSELVES[here]):
                found.append(f"{own} imports {other}")
    assert found == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): imported_when_loaded(path) & MODULES - {name_of(path)} for path in FILES}
    # A package's __init__ that gathers its own modules is no circle by itself, so only the modules' own edges count.
    while free := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in free:
            del graph[module]
    assert graph == {}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_is_imported_in_its_own_place_only(library: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(tree(path)))
    }
    allowed = ONLY_IN[library]
    strange = {path for path in importers if path not in allowed and path.rpartition("/")[0] + "/" not in allowed}
    assert strange == set()
    assert importers, f"nothing imports {library}: does this test still look in the right way?"


def python(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}", *arguments]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "print([name for name in ('torch', 'mlflow', 'deepspeed', 'nvidia.dali', 'numba') if name in sys.modules])"


def test_what_launches_and_plans_imports_no_torch() -> None:
    loads = "\n".join(f"import {module}" for module in TORCH_FREE)
    assert python(f"{loads}\n{HEAVY}").strip() == "[]"


def test_launching_a_job_imports_no_torch_up_to_the_moment_torchrun_starts(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "workers: 2\nglobal_batch: 8\nmicro_batch: 4\n"
        "data: {name: demo, root: drawn, size: 32, options: {train_count: 12, val_count: 10, size: 48}}\n"
    )
    program = """
from service.jobs import local
started = []
local.supervise = lambda line, *_: (started.append(line), (0, 0))[1]
local.run("tiny.yaml")
print("torch" in sys.modules, "torch.distributed.run" in started[0])
"""
    assert python(program, cwd=tmp_path).split() == ["False", "True"]


def test_the_command_line_is_quick_because_it_loads_little() -> None:
    loaded = set(json.loads(python("import service.cli, json; print(json.dumps(list(sys.modules)))")))
    assert loaded & {"numpy", "pydantic", "yaml", "pyarrow", "PIL", "service.config"} == set()


def test_nothing_unpickles_and_nothing_starts_a_shell() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                shell = any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords)
                tensors_only = called == "torch.load" and any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
                )
                unsafe = called in ("torch.load", "yaml.load", "eval", "exec", "os.system") and not tensors_only
                if unsafe or shell:
                    found.append(f"{path.name}:{node.lineno} {called}")
        found += [f"{path.name} imports {name}" for name in imports(tree(path)) if name in ("pickle", "dill", "joblib")]
    assert found == []


def test_files_are_short_and_named_by_what_they_hold() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    vague = [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc", "base", "manager"}]
    assert (long, vague) == ({}, [])
