"""What recording costs a training, by the state of the tracking server: well, slow, failing, killed.

Ratios to no recording.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.record_cost [--rounds 5] [--steps 600] [--every 20] [--delay 3]

Every twentieth step of a small network logs twenty values, as a job does by default; `--every 1` is twenty times that,
of which the server, on the same two cores, takes its share. In each round every case trains the same number of steps; a
ratio is the median over the rounds, each paired with its own round's training without a record. `slowest append` is the
longest single call of `log_metrics`. A failing server answers 500, 503 and 429 by turns from the first record on.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from service import models, tracking
from service.config import ModelConfig, TrackingConfig
from tests.integration.record_server import Server

PROXY = Path(__file__).resolve().parents[1] / "integration" / "fault_proxy.py"
CASES = ("none", "well", "slow", "failing", "killed")
ERRORS = ("500", "503", "429")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=20, help="steps between two records")
    parser.add_argument("--delay", type=float, default=3.0, help="seconds that the slow server takes for a request")
    given = parser.parse_args()
    torch.set_num_threads(1)
    step = training()
    ratios: dict[str, list[float]] = {case: [] for case in CASES}
    appends: dict[str, list[float]] = {case: [0.0] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        try:
            train(step, given, None)
            for number in range(given.rounds):
                times = {}
                # Each case comes first, second, ... in turn.
                first = number % len(CASES)
                for case in CASES[first:] + CASES[:first]:
                    times[case], slowest = one(case, step, server, Path(folder) / f"{case}{number}", given)
                    appends[case].append(slowest)
                for case in CASES:
                    ratios[case].append(times[case] / times["none"])
                print(f"round {number + 1}: " + ", ".join(f"{case} {times[case]:.2f} s" for case in CASES), flush=True)
        finally:
            server.kill()
    for case in CASES[1:]:
        median, slowest_ms = statistics.median(ratios[case]), 1000 * max(appends[case])
        print(f"{case:8}{median:.3f} of the time without a record; slowest append {slowest_ms:.1f} ms")
    well = statistics.median(ratios["well"])
    for case in CASES[2:]:
        print(f"{case} : well = {statistics.median(ratios[case]) / well:.3f}")


def training() -> Callable[[], float]:
    """One optimizer step of a small network; returns its loss."""
    torch.manual_seed(0)
    network = models.build(ModelConfig(name="resnet_small", width=16), 10, 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))

    def step() -> float:
        optimizer.zero_grad()
        logits = network(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def one(
    case: str, step: Callable[[], float], server: Server, folder: Path, given: argparse.Namespace
) -> tuple[float, float]:
    """Train with the server in this state; the time it took and the slowest append, seconds."""
    if case == "none":
        return train(step, given, None)
    with contextlib.ExitStack() as stack:
        proxy, port = started(stack, server, str(given.delay if case == "slow" else 0))
        uri = f"http://127.0.0.1:{port}"
        run = tracking.open_run(TrackingConfig(uri=uri, system_metrics=False), name=case, folder=folder)
        if case in ("failing", "killed"):
            proxy.kill()
            proxy.wait()
        if case == "failing":
            started(stack, server, "0", "--port", str(port), "--status", *ERRORS)
        found = train(step, given, run)
        run.finish(timeout_s=0.1)
    return found


def started(stack: contextlib.ExitStack, server: Server, *arguments: str) -> "tuple[subprocess.Popen[bytes], int]":
    """A proxy before the server until `stack` closes, and its port."""
    proxy = subprocess.Popen([sys.executable, str(PROXY), str(server.port), *arguments], stdout=subprocess.PIPE)
    # At its end it waits for the killed one.
    stack.enter_context(proxy)
    stack.callback(proxy.kill)
    assert proxy.stdout is not None
    return proxy, int(proxy.stdout.readline())


def train(step: Callable[[], float], given: argparse.Namespace, run: tracking.Run | None) -> tuple[float, float]:
    """Time of `given.steps` and of the slowest append among them, seconds."""
    slowest = 0.0
    began = time.perf_counter()
    for number in range(1, given.steps + 1):
        loss = step()
        if run is not None and number % given.every == 0:
            before = time.perf_counter()
            run.log_metrics({f"train/value{key}": loss + key for key in range(20)}, number)
            slowest = max(slowest, time.perf_counter() - before)
    return time.perf_counter() - began, slowest


if __name__ == "__main__":
    main()
