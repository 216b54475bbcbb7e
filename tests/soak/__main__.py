"""Train for half an hour while everything goes wrong, and say what was lost.

    python -m tests.soak [--minutes 30] [--seed N] [--only NAME ...] [--keep FOLDER]

First the job runs undisturbed for a while, which gives the rate that the rest is compared with. Exit code 1 if anything
was lost. The schedule depends on the seed alone; what it meets does not.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.integration import sample_logs
from tests.integration.debian import RefusedError
from tests.integration.processes import await_
from tests.soak import checks
from tests.soak.cluster import GLOBAL_BATCH, LOG_EVERY, SAMPLES, Cluster, cluster, last_step, rate
from tests.soak.faults import FAULTS, Fault

# Of the time, for steps: the rest is what faults are expected to cost.
_SHARE = 0.5
_PATIENCE_S = 300


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 10**6))
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(fault.name for fault in FAULTS))
    parser.add_argument("--keep", type=Path, help="leave everything in this new folder")
    given = parser.parse_args()
    chosen = [fault for fault in FAULTS if not given.only or fault.name in given.only]
    if not chosen:
        parser.error(f"--only: there are {', '.join(fault.name for fault in FAULTS)}")
    if given.keep:
        given.keep.mkdir(parents=True)
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="lorot-soak-"))).resolve()
    try:
        with cluster(folder) as made:
            return soak(made, chosen, given.minutes, given.seed)
    except RefusedError as error:
        print(f"error: {error}; it takes root, or a machine that allows namespaces to users", file=sys.stderr)
        return 1
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def soak(made: Cluster, chosen: list[Fault], minutes: float, seed: int) -> int:
    """The undisturbed stretch, the job under fire, and the account of it."""
    if left_out := [fault.name for fault in chosen if fault.needs_disk and not made.is_limited]:
        print(f"left out, since no disk can be mounted here: {', '.join(left_out)}")
        chosen = [fault for fault in chosen if fault.name not in left_out]
    made.begin("undisturbed", 10**7)
    steps_per_s = rate(made, max(20.0, 4 * minutes))
    made.end()
    total = max(200, round(60 * minutes * _SHARE * steps_per_s))
    print(f"undisturbed: {steps_per_s:.1f} steps/s; seed {seed}: {total} steps, {minutes:g} minutes are expected")

    dice = random.Random(seed)
    began = time.monotonic()
    made.begin("disturbed", total)
    await_(lambda: last_step(made.run) > 0, "both machines train", _PATIENCE_S, made.told)
    first_s = time.monotonic() - began
    deck: list[Fault] = []
    felt: dict[str, list[float]] = {fault.name: [] for fault in chosen}
    while not made.is_done():
        deck = deck or dice.sample(chosen, len(chosen))
        pause_until = time.monotonic() + dice.uniform(3, 20)
        while time.monotonic() < pause_until and not made.is_done():
            time.sleep(0.1)
        if made.is_done():
            break
        fault = deck.pop()
        if not inject(made, fault, dice, felt, time.monotonic() - began):
            # There was nothing to do it to at this moment.
            deck.insert(0, fault)
    spent = time.monotonic() - began - first_s
    ends = dict(sorted(made.ends.items()))
    made.end()
    made.settle()
    print(f"exit codes of launchers: {', '.join(f'{code} ({count} times)' for code, count in ends.items())}")
    show(felt)
    attempts = made.steps_begun()
    print(f"steps made again: {attempts - total} of {total}")
    print(f"time: {spent / 60:.1f} minutes, {spent * steps_per_s / total:.2f} of what an undisturbed run takes")
    complaints = lost(made, total) + checks.ends(ends)
    # A fault that nothing was tried with proves nothing.
    complaints += [f"{name}: was never injected; run it for longer" for name, times in felt.items() if not times]
    for complaint in complaints:
        print(f"NOT WELL: {complaint}")
    if not complaints:
        print("lost: nothing (samples, steps, record, model)")
    return int(bool(complaints))


def inject(made: Cluster, fault: Fault, dice: random.Random, felt: dict[str, list[float]], at: float) -> bool:
    """Let it happen, and wait until training goes on; false if it could not happen now."""
    struck_ns, reached = time.time_ns(), made.latest()
    did = fault.inject(made, dice)
    if not did:
        return False

    def trains() -> bool:
        # Steps that were under way when it struck are no sign of recovery: those of a later attempt are.
        latest = made.latest()
        return made.is_done() or (latest.attempt_ns > struck_ns if fault.is_felt else latest > reached)

    await_(trains, f"training goes on after: {fault.name}: {did}", _PATIENCE_S, made.told)
    after_s = (time.time_ns() - struck_ns) / 1e9
    felt[fault.name].append(after_s)
    print(f"{at / 60:6.1f} min  {fault.name}: {did}; step {made.latest().step} after {after_s:.0f} s", flush=True)
    return True


def show(felt: dict[str, list[float]]) -> None:
    """How often each fault was injected, and how long it took until training went on."""
    print(f"{'injected':28}times   seconds to the next step: median, longest")
    for name, seconds in felt.items():
        shown = f"{statistics.median(seconds):8.1f}{max(seconds):8.1f}" if seconds else ""
        print(f"{name:28}{len(seconds):5}   {shown}")


def lost(made: Cluster, total: int) -> list[str]:
    """What is missing at the end of the job."""
    found = checks.samples(sample_logs.order(made.run), SAMPLES, GLOBAL_BATCH)
    summary = json.loads((made.run / "summary.json").read_text())
    if summary["images"] != total * GLOBAL_BATCH:
        found.append(f"the summary counts {summary['images']} images")
    found += checks.left_out(made.run, made.left_out)
    found += checks.not_finite(summary, checks.read_lines(made.run / "metrics.jsonl"), made.bad_losses())
    if unmade := made.bad_steps() - {loss["step"] for loss in made.bad_losses()}:
        found.append(f"steps {sorted(unmade)} were to have losses that are not finite, and had not")
    return found + checks.tracked(made.database, total, made.run, LOG_EVERY)


if __name__ == "__main__":
    sys.exit(main())
