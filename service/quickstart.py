"""The main job on a laptop, from nothing to a report: `lorot quickstart`."""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service import config, config_file, report
from service.errors import JobError
from service.jobs import local

_NAME = "quickstart.yaml"


def run(overrides: Sequence[str], *, page: Path, console: Console) -> None:
    """Draw the data, train, register, localize with the registered model, write the report, and say how it went.

    Args:
        overrides: `key.sub=value` on top of configs/quickstart.yaml.
        page: where the report goes.

    Raises:
        LorotError: as training, localization and the report do.
    """
    began = time.perf_counter()
    path = configuration()
    job = config.load(path, list(overrides))
    console.print(
        f"Training {job.model.name} with {job.pretext.name} on {job.data.name}; the configuration is {path}",
        soft_wrap=True,
    )
    local.run(path, overrides, restart=True, say=lambda text: console.print(text, markup=False, highlight=False))
    summary = read_summary(job.folder)
    # Only now, since it imports torch, which the launcher does without.
    from service.downstream import wsol

    result = wsol.run(
        f"models:/{job.model_name}@latest",
        tracking_uri=job.tracking.uri,
        experiment=job.tracking.experiment,
        device=job.device,
        loader=job.data.loader,
        output=job.folder / "wsol",
    )
    report.write(job.folder, page, wsol=result.folder)
    scores = result.scores
    found = {
        "top-1": f"{scores.top1:.1%} of {scores.num_images:,} held-out images",
        "GT-known localization": f"{scores.max_box_acc:.1%}, the best centre box {scores.centre_box_acc:.1%}",
        "model": f"models:/{job.model_name}/{result.version}",
        "wall time": f"{time.perf_counter() - began:.0f} s, of it training {summary.get('wall_s', 0):.0f} s",
        "report": str(page),
    }
    show(found, job.model_name, path, console)


def configuration() -> Path:
    """The quickstart's configuration: the checkout's, or the one that was installed with the package."""
    return config_file.shipped(_NAME)


def read_summary(folder: Path) -> dict[str, Any]:
    """What training left in summary.json; raises JobError if it is not there or damaged."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"{folder / 'summary.json'}: training left no readable summary ({error})") from None
    return summary


def show(found: dict[str, str], model_name: str, path: Path, console: Console) -> None:
    """Print the figures, and what to type next."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in found.items():
        table.add_row(label, text)
    lorot = command()
    table.add_row("next", f"open {found['report']} in a browser")
    table.add_row("", f"{lorot} models")
    table.add_row("", f"{lorot} wsol --model models:/{model_name}@latest --axis iou")
    table.add_row("", f"{lorot} train {path} name=baseline pretext.name=none objective.name=supervised")
    console.print()
    console.print(table, markup=False, highlight=False)


def command() -> str:
    """How the `lorot` command is typed here: by its name, or by its path if no shell would find it."""
    if shutil.which("lorot"):
        return "lorot"
    beside = Path(sys.executable).parent / "lorot"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m service.cli"
