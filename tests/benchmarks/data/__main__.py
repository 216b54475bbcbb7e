"""Data loaders side by side: rates, CPU time, memory and disk, in interleaved rounds, on this machine.

    python -m tests.benchmarks.data [--corpus light|photo] [--only ours torchvision ...] [--quick]

The first run makes the corpora and the other loaders' environment below .bench. README.md says what the figures mean.
Ends with 1 if a bar is missed or a loader does not do the same work as the others, in which case it says which.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.data import checks, corpus, environment, loaders, measure, table
from tests.benchmarks.data.measure import LoaderError

CHILD = "tests.benchmarks.data.child"
_LIBRARIES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numba", "numpy")
_REFERENCE = {"full": "torchvision", "256": "torchvision_256"}
_CHECKED = 2048
_VERSIONS = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


class Bench:
    """One run of the benchmark: what is measured with what, and what was found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.every = loaders.available()
        self.chosen = [name for name in self.every if not arguments.only or name in arguments.only]
        self.cache = arguments.folder.absolute() / "data"
        self.foreign, failed = environment.make(arguments.folder, install=not arguments.no_install)
        self.left_out: dict[str, str] = {}
        self.folders: dict[tuple[str, str], Path] = {}
        self.why = failed

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def prepare(self, name: str, which: str) -> bool:
        """Make the form of corpus `which` that a row reads; without success the row is left out."""
        module, row, foreign = self.every[name]
        if (name, which) in self.folders:
            return True
        if module in self.why:
            self.left_out[row.title] = self.why[module]
            return False
        interpreter = self.foreign if foreign or not _has("skimage") else Path(sys.executable)
        line = [str(interpreter), "-m", "tests.benchmarks.data.corpus", str(self.cache), which, name]
        done = subprocess.run(line, cwd=environment.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [text for text in done.stderr.splitlines() if text.strip()] or [f"ended with {done.returncode}"]
            self.left_out[row.title] = said[-1].strip()
            return False
        self.folders[name, which] = Path(done.stdout.splitlines()[-1])
        return True

    def child(self, name: str, which: str, *options: str) -> dict[str, Any] | None:
        """Run a loader's child; None, with a note, if it could not be run."""
        _, row, foreign = self.every[name]
        interpreter = self.foreign if foreign else Path(sys.executable)
        words = [name, str(self.folders[name, which]), "--batch", str(self.arguments.batch)]
        words += ["--cores", str(self.arguments.cores), *options]
        try:
            return measure.run(interpreter, CHILD, words, self.arguments.cores)
        except LoaderError as error:
            self.left_out[row.title] = str(error)
            return None

    def check(self, name: str, described: dict[str, Any]) -> list[str]:
        """In what a loader's images are not as torchvision's; `described` keeps what was found out of others."""
        _, row, _ = self.every[name]
        if not row.renders:
            return []
        count = "--images", str(max(self.arguments.batch, _CHECKED))
        which = self.arguments.corpus
        reference = _REFERENCE[row.stored]
        for needed in (reference, name):
            if needed not in described and self.prepare(needed, which):
                described[needed] = self.child(needed, which, "--check", *count)
        found, other = described.get(name), described.get(reference)
        if not found or not other:
            return ["could not be checked"]
        problems = checks.differences_in_pixels(found, other, self.arguments.batch, 224)
        # Turned patches hide where the window lies; they are the same windows as without.
        if not row.options.get("task") and self.prepare(name, "ruler"):
            ruler = self.child(name, "ruler", "--check", *count)
            problems += checks.differences_in_windows(ruler, self.wanted) if ruler else ["its windows: not checked"]
        return problems

    def run(self) -> dict[str, Any]:
        """Everything, with the results so far kept in a file after every measurement."""
        arguments = self.arguments
        started = time.strftime("%Y%m%d-%H%M%S")
        path = arguments.folder / "results" / f"{arguments.corpus}-{started}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in self.chosen:
            self.say(f"preparing {name}")
            rows += [name] if self.prepare(name, arguments.corpus) else []
        if not rows:
            raise SystemExit("nothing can be run: " + "; ".join(f"{a}: {b}" for a, b in self.left_out.items()))
        self.wanted = checks.expected()
        described: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for name in rows:
            self.say(f"checking {name}")
            problems = [] if arguments.no_check else self.check(name, described)
            for problem in problems:
                self.say(f"  not the same work: {problem}")
            folder = self.folders[name, arguments.corpus]
            disk = corpus.num_bytes(folder) / corpus.CORPORA[arguments.corpus].count
            facts[name] = {"title": self.every[name][1].title, "disk_bytes": disk, "problems": problems}
        files = corpus.folder(self.cache, arguments.corpus) / "files"
        count = corpus.CORPORA[arguments.corpus].count
        results: dict[str, Any] = {
            "corpus": arguments.corpus,
            "files": count,
            "file_bytes": corpus.num_bytes(files) / count,
            "batch": arguments.batch,
            "images": arguments.images,
            "warm_up": arguments.warm_up,
            "rounds_wanted": arguments.rounds,
            "machine": machine(self.foreign, arguments.cores),
            "rows": facts,
            "rounds": {name: [] for name in rows},
            "left_out": self.left_out,
        }
        path.write_text(json.dumps(results))
        for number in range(arguments.rounds):
            # Every other round goes backwards: what drifts while a round lasts cancels.
            for name in rows if number % 2 == 0 else rows[::-1]:
                amounts = "--images", str(arguments.images), "--warm-up", str(arguments.warm_up)
                measured = self.child(name, arguments.corpus, *amounts)
                results["rounds"][name].append(measured)
                path.write_text(json.dumps(results))
                shown = f"{measured['images_per_s']:,.0f} images/s, {measured['images_per_cpu_s']:,.0f} a CPU-second"
                self.say(f"round {number + 1}: {name}: {shown if measured else 'failed'}")
        self.say(f"results: {path}")
        return results


def machine(foreign: Path, cores: int) -> str:
    """Processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or platform.machine())
    names = [*_LIBRARIES, *(line.partition("==")[0] for line in environment.requirements())]
    versions = subprocess.run([str(foreign), "-c", _VERSIONS, *names], capture_output=True, text=True).stdout
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{model}, {cores} of {psutil.cpu_count()} cores, {memory:.0f} GB; Python {platform.python_version()}; "
        + ", ".join(versions.split("\n")).rstrip(", ")
    )


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=("light", "photo"), default="light")
    parser.add_argument("--only", nargs="+", choices=tuple(loaders.available()), help="these loaders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6144, help="measured of each loader in a round")
    parser.add_argument("--warm-up", type=int, default=1024, help="images before that")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="environment, corpora and results")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--no-install", action="store_true", help="take what is installed")
    parser.add_argument("--no-check", action="store_true", help="do not compare the loaders' images")
    parser.add_argument("--show", type=Path, help="print the table of an earlier results' file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.images, arguments.warm_up = 1, 1024, 256
    results = json.loads(arguments.show.read_text()) if arguments.show else Bench(arguments).run()
    print(table.describe(results))
    different = any(facts["problems"] for facts in results["rows"].values())
    missed = results["corpus"] == "light" and not table.bars(results["rounds"])[1]
    sys.exit(1 if different or missed else 0)


if __name__ == "__main__":
    main()
