"""`lorot detect` and `lorot segment`: their options. Imports nothing that is slow when loaded."""

import inspect
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Model = Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.")]
Config = Annotated[Path | None, typer.Option(help="Configuration; default: COCO's 1x schedule, in configs/downstream.")]
Data = Annotated[str | None, typer.Option(help="Data set; default: the configuration's, coco.")]
Root = Annotated[Path | None, typer.Option(help="Folder that holds it.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values on top of it.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")]
Restart = Annotated[bool, typer.Option("--restart", help="Set an earlier run aside and begin anew.")]
EvalOnly = Annotated[bool, typer.Option("--eval-only", help="Evaluate the detector of a finished run once more.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "--nproc", help="Processes; default: `workers`, or GPUs, or one.", min=1)
]
Port = Annotated[int | None, typer.Option(help="Port the workers meet at; default: a free one.", min=1, max=65535)]
Nnodes = Annotated[str | None, typer.Option(metavar="MIN:MAX", help="Machines; each runs this command.")]
Rdzv = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machines meet.")]
RunId = Annotated[str | None, typer.Option(help="The job's name there; default: the run's.")]
MaxRestarts = Annotated[int | None, typer.Option(help="Failures in a row to restart after.", min=0)]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/.")]


HELP = {
    "detect": """Train RetinaNet on a registered classifier and measure COCO's box AP, recorded at that model's version.

    As in `lorot detect --model models:/lorot-imagenet@best --data coco --root /data/coco seed=1`. A training job like
    any other: distributed, resumable, with the keys of `lorot train` but for data, model and the defaults.
    """,
    "segment": """Train SOLOv2 on a registered classifier and measure COCO's mask AP, recorded at that model's version.

    As in `lorot segment --model models:/lorot-imagenet@best --data coco --root /data/coco`.
    """,
}


def train_detector(
    context: typer.Context,
    model: Model,
    data: Data = None,
    root: Root = None,
    config: Config = None,
    overrides: Overrides = None,
    resume: Resume = False,
    restart: Restart = False,
    eval_only: EvalOnly = False,
    workers: Workers = None,
    port: Port = None,
    nnodes: Nnodes = None,
    rdzv: Rdzv = None,
    run_id: RunId = None,
    max_restarts: MaxRestarts = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """What both commands do; the job is called as the command."""
    from service import transfer

    here = {"workers": workers, "port": port, "max_restarts": max_restarts}
    there = {"nnodes": nnodes, "rdzv": rdzv, "run_id": run_id}
    prepared = transfer.prepare(
        *(str(context.command.name), model),
        path=config,
        data=data,
        root=root,
        overrides=overrides or (),
        tracking_uri=tracking_uri,
        goes_on=resume or eval_only,
    )
    launch = here | there
    result = transfer.run(prepared, resume=resume, restart=restart, eval_only=eval_only, launch=launch, say=typer.echo)
    transfer.show(prepared, result, Console())


def add_to(app: typer.Typer) -> None:
    """Make both commands of `app`."""
    for job, text in HELP.items():
        app.command(job, help=inspect.cleandoc(text))(train_detector)
