"""`lorot wsol` and `lorot figures`: what is asked of registered models without training anything."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

DataName = Annotated[str | None, typer.Option(help="Data set; default: the one it was trained on.")]
Root = Annotated[Path | None, typer.Option(help="Folder that holds the data set.")]
Split = Annotated[str | None, typer.Option(help="Split; default: the one it was evaluated on.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Loader = Annotated[str, typer.Option(help="dali or torch.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/.")]
DataOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The data set's options.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Make both commands of `app`."""
    app.command()(wsol)
    app.command()(figures)


def wsol(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.")],
    data: DataName = None,
    root: Root = None,
    split: Split = None,
    axis: Annotated[str, typer.Option(help="Reading of table 9 to print first: cam or iou thresholds.")] = "cam",
    protocol: Annotated[
        str, typer.Option(help="paper, or official: as the code behind table 9 makes boxes of maps.")
    ] = "paper",
    component: Annotated[
        str | None, typer.Option(help="Largest by pixels or contours; default: paper pixels, official contours.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images.", min=1)] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    loader: Loader = "dali",
    tracking_uri: TrackingUri = None,
    options: DataOptions = None,
) -> None:
    """Localize objects with a registered classifier (weakly supervised), beside a centre box."""
    from service import inventory
    from service.downstream import wsol as job

    if axis not in ("cam", "iou"):
        raise typer.BadParameter(f"{axis!r} is none of cam, iou", param_hint="--axis")
    result = job.run(
        model,
        data=data,
        root=root,
        split=split,
        data_options=inventory.parse_options(options) if options else None,
        axis="iou" if axis == "iou" else "cam",
        protocol=protocol,
        component=component,
        tracking_uri=tracking_uri,
        batch_size=batch_size,
        device=device,
        loader=loader,
        output=output,
        limit=limit,
    )
    job.show(result, Console())


def figures(
    model: Annotated[list[str], typer.Option(help="models:/NAME@ALIAS, ...; may be given again: all see one set.")],
    output: Annotated[Path, typer.Option(help="Folder to fill.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="cam, pretext-cam, tsne or affinity; may be given again; default: all that can be."),
    ] = None,
    data: DataName = None,
    root: Root = None,
    split: Split = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Transformation of tsne and affinity; default: rotation, lorot_i, lorot_e.")
    ] = None,
    images: Annotated[int, typer.Option(help="Shown in pictures.", min=1, max=64)] = 6,
    limit: Annotated[int | None, typer.Option(help="Images that numbers are taken over; default: all.", min=1)] = None,
    points: Annotated[int, typer.Option(help="Images of a t-SNE.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Of all draws.", min=0)] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    loader: Loader = "dali",
    tracking_uri: TrackingUri = None,
    options: DataOptions = None,
) -> None:
    """Draw figures of the LoRot paper from registered models: PNG, and the numbers behind them as JSON.

    cam: class activation maps (fig. 3). pretext-cam: where a model looks to predict its pretext label (fig. 4).
    tsne: features of original and transformed images (fig. 1). affinity: the distribution's shift (eq. 1, table 2).
    """
    from service import inventory
    from service.downstream.paper import job

    result = job.run(
        model,
        output=output,
        kinds=kind or (),
        data=data,
        root=root,
        split=split,
        data_options=inventory.parse_options(options) if options else None,
        tasks=task or job.TASKS,
        images=images,
        limit=limit,
        points=points,
        seed=seed,
        batch_size=batch_size,
        device=device,
        loader=loader,
        tracking_uri=tracking_uri,
    )
    job.show(result, Console())
