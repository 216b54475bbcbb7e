"""`lorot compare`: its options. Imports nothing that is slow when loaded."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]... [KEY=VALUE]...",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/..., folders; KEY=VALUE for detectors, JOB.KEY=VALUE.",
        show_default=False,
    ),
]
Jobs = Annotated[str, typer.Option(help="Of wsol, detect and segment.")]
Seeds = Annotated[str | None, typer.Option(help="Of the detectors' trainings, as 0,1,2; default: the configuration's.")]
Config = Annotated[
    list[str] | None, typer.Option(metavar="JOB=FILE", help="Configuration; default: COCO's 1x schedule.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="[JOB=]NAME", help="Data set of the detectors, or of JOB; wsol's default: each model's own."),
]
Root = Annotated[list[str] | None, typer.Option(metavar="[JOB=]FOLDER", help="Folder that holds it.")]
Grouped = Annotated[
    list[str] | None,
    typer.Option("--group", metavar="NAME=MODEL,MODEL", help="Models of one method; default: by their cards."),
]
Baseline = Annotated[
    str | None, typer.Option(help="Group the others are paired with; default: the one without a pretext task.")
]
Output = Annotated[Path, typer.Option(help="Folder of the table and the figures.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what is there and what would run.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/.")]


def compare(
    words: Words = None,
    jobs: Jobs = "wsol,detect,segment",
    data: Data = None,
    root: Root = None,
    group: Grouped = None,
    seeds: Seeds = None,
    config: Config = None,
    baseline: Baseline = None,
    output: Output = Path("comparison"),
    dry_run: DryRun = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Compare registered models: classification, localization, detection and segmentation in one table.

    What the registry already has (same weights, data and settings) is used again, the rest is measured; interrupted,
    the same command goes on where it was. Models of one method are a row, with their spread. As in
    `lorot compare models:/baseline@best models:/lorot-e@best --jobs wsol,detect --root /data/coco`.
    """
    from service.comparison import entrants, job, wishes
    from service.errors import ConfigError

    models, overrides = wishes.apart(words or ())
    stated: dict[str, tuple[str, ...]] = {}
    for text in group or ():
        name, addresses = entrants.parse_group(text)
        if name in stated:
            raise ConfigError(f"--group {name} is given twice; put all its models into one")
        stated[name] = addresses
    wish = wishes.wish(
        jobs,
        seeds=seeds,
        configs=config or (),
        data=data or (),
        root=root or (),
        overrides=overrides,
        tracking_uri=tracking_uri,
    )
    code = job.run(
        models,
        wish,
        output=output,
        stated=stated,
        baseline=baseline,
        dry_run=dry_run,
        console=Console(),
        say=lambda text: typer.echo(text, err=True),
    )
    if code:
        raise typer.Exit(code)


def add_to(app: typer.Typer) -> None:
    """Make the command one of `app`."""
    app.command()(compare)
