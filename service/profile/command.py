"""Starts the workers that profile a job, and shows what they found. Imports no torch."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service import config
from service.errors import ConfigError
from service.jobs import local, torchrun
from service.profile.findings import RESULT, Findings, Phase, Setting
from service.run_folder import RunFolder

WORKER = "service.profile.worker"


def run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    steps: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Findings:
    """Profile the job; nothing of it is kept, recorded or registered.

    Raises:
        LorotError: as training would.
    """
    job = config.load(path, list(overrides))
    count = local.num_workers(job, workers)
    config.accumulation_steps(job, count)
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps}: at least one step has to be measured")
    with tempfile.TemporaryDirectory(prefix="lorot-profile-") as place:
        given = [*overrides, f"output={place}"]
        folder = RunFolder(config.load(path, given).folder)
        options = ["--steps", str(steps)] if steps else []
        say(f"measuring on {count} worker{'s' if count > 1 else ''}: the loader, the step, both; up to two minutes")
        line = torchrun.command(path, given, workers=count, shutdown_s=job.shutdown_s, module=WORKER, options=options)
        local.launch(folder, line, count, timeout_s=job.timeout_s)
        found = folder.read(RESULT)
    phases = {name: Phase(**found[name]) for name in ("loader", "step", "both")}
    return Findings(Setting(**found["setting"]), **phases)


def summary(found: Findings) -> dict[str, Any]:
    """The findings as JSON values: what was measured, and what follows from it."""
    derived = {
        name: dataclasses.asdict(phase) | {"images_per_s": phase.images_per_s}
        for name, phase in (("loader", found.loader), ("step", found.step), ("both", found.both))
    }
    return {
        "setting": dataclasses.asdict(found.setting),
        **derived,
        "data_wait_share": found.both.wait_share,
        "bottleneck": found.bottleneck,
        "balance": found.balance(),
        "advice": found.advice(),
    }


def show(found: Findings, console: Console) -> None:
    """Print the findings for people."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "images/s", "cores busy", "waits"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    rows = (
        ("loader alone", found.loader, "for files"),
        ("step alone", found.step, ""),
        ("both", found.both, "for data"),
    )
    for name, phase, what in rows:
        busy = f"{phase.cpu_s / phase.seconds:.2f}"
        table.add_row(name, f"{phase.images_per_s:,.1f}", busy, f"{phase.wait_share:.1%} {what}" if what else "")
    console.print(table, markup=False)
    console.print(f"measured at an input of {found.setting.size} x {found.setting.size} pixels", highlight=False)
    console.print(f"\n{found.verdict()}", style="bold", markup=False)
    console.print(found.balance(), markup=False, highlight=False)
    for text in found.advice():
        console.print(f"- {text}", markup=False, highlight=False)
