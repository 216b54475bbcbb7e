"""The `lorot` command. Every command imports what it needs when it runs, so that help and completion are quick."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from service.commands import asking, compare, demo_coco, detect, jobs, operations, travel
from service.commands.terminal_text import printable
from service.errors import EXIT_CODES, LorotError
from service.planning.command import plan

app = typer.Typer(
    name="lorot",
    help="Train image classifiers with localizable rotation, register them, and ask them where things are.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Prepare data sets for training, look for damage in them, count and show what they hold; draw the demo set.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")
demo_coco.add_to(data_app)


class ConfigCommand(TyperCommand):
    """A command that takes a configuration: its help goes on to explain every key."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the command's own help, then the configuration keys."""
        super().format_help(ctx, formatter)
        from service import help

        help.print_keys(Console())


Config = Annotated[Path, typer.Argument(help="Configuration file, as configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values on top of it.", show_default=False)
]
Workers = Annotated[int | None, typer.Option(help="Processes; default: `workers`, or one per GPU, or one.", min=1)]
DataName = Annotated[str | None, typer.Option(help="Data set; default: prepared or folder, as it looks.")]
DataOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The data set's options.", show_default=False)
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/.")]


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from.", envvar="LOROT_DEBUG")
    ] = False,
) -> None:
    """Options of all commands; read by `main`."""
    os.environ["LOROT_DEBUG"] = "1" if debug else ""


@app.command(cls=ConfigCommand)
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Set an earlier run aside and begin anew.")] = False,
    init_from: Annotated[str | None, typer.Option(help="Model or run to take fitting weights from.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "--nproc", help="Processes; default: `workers`, or GPUs, or one.", min=1)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port the workers meet at; default: a free one.", min=1, max=65535)
    ] = None,
    nnodes: Annotated[str | None, typer.Option(metavar="MIN:MAX", help="Machines; each runs this command.")] = None,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machines meet.")] = None,
    run_id: Annotated[str | None, typer.Option(help="The job's name there; default: the run's.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="Failures in a row to restart after; default: 0, or 3 with --nnodes.", min=0)
    ] = None,
) -> None:
    """Train on this machine as CONFIG says, or as one machine of several, and register the model."""
    from service.jobs import local

    overrides = [*(overrides or ()), *([f"model.init_from={json.dumps(init_from)}"] if init_from else ())]
    here: dict[str, Any] = {"workers": workers, "port": port, "max_restarts": max_restarts}
    there: dict[str, Any] = {"nnodes": nnodes, "rdzv": rdzv, "run_id": run_id}
    local.run(config, overrides, resume=resume, restart=restart, say=typer.echo, **here, **there)


@app.command()
def rendezvous(
    host: Annotated[str | None, typer.Option(help="This machine's name for the others; default: its address.")] = None,
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 29400,
) -> None:
    """Keep the place where the machines of a job meet, until SIGTERM; run it on a machine that outlives them."""
    from service.jobs import rendezvous as place

    place.serve(host, port, say=typer.echo)


@app.command(cls=ConfigCommand)
def check(config: Config, overrides: Overrides = None, workers: Workers = None) -> None:
    """Say what CONFIG amounts to: steps, batches, schedule, memory and storage. Starts nothing."""
    from service import check as checking
    from service import config as configuration

    findings = checking.examine(configuration.load_any(config, overrides or ()), workers)
    checking.show(findings, Console())
    if findings.missing:
        raise typer.Exit(3)


@app.command(cls=ConfigCommand)
def profile(
    config: Config,
    overrides: Overrides = None,
    workers: Workers = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each phase; default: 20 s of them.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure CONFIG's loader alone, its step alone, and both: which is the bottleneck, and what to change."""
    from service.profile import command

    found = command.run(
        config, overrides or (), workers=workers, steps=steps, say=lambda text: typer.echo(text, err=True)
    )
    if as_json:
        typer.echo(json.dumps(command.summary(found), indent=1))
    else:
        command.show(found, Console())


app.command(cls=ConfigCommand)(plan)
detect.add_to(app)
compare.add_to(app)
travel.add_to(app)
jobs.add_to(app)
operations.add_to(app)


@app.command()
def doctor(tracking_uri: TrackingUri = None) -> None:
    """Say what this machine can do, and how to mend what it cannot."""
    from service import doctor as diagnosis

    findings = diagnosis.examine(tracking_uri)
    diagnosis.show(findings, Console())
    if diagnosis.fails(findings):
        raise typer.Exit(1)


asking.add_to(app)


@app.command()
def models(tracking_uri: TrackingUri = None) -> None:
    """List the registered models: how good, what from, and what was found out about them since."""
    from service import inventory

    inventory.show_models(Console(), tracking_uri)


@app.command()
def quickstart(
    overrides: Overrides = None,
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
) -> None:
    """Generate data, train with LoRot-E on two workers, register, localize from the registry, and report."""
    from service import quickstart as chain

    chain.run(overrides or (), page=report, console=Console())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, as runs/quickstart.")],
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    wsol: Annotated[Path | None, typer.Option(help="Folder of a localization's results, to be shown as well.")] = None,
) -> None:
    """Write a run's report: one self-contained HTML page."""
    from service import report as page

    Console().print(f"report: {page.write(run, output, wsol=wsol)}", markup=False)


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(help="Run folder, as runs/train, or the folder of all: runs.")],
    tracking_uri: TrackingUri = None,
) -> None:
    """Send what the tracking server has not got yet, register what waits, and mark runs that were killed as FAILED."""
    from service import recovery

    if not recovery.run(run, tracking_uri, typer.echo):
        raise typer.Exit(6)


@data_app.command("demo")
def data_demo(
    root: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("data/demo"),
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As train_count=600.")] = None,
) -> None:
    """Generate the demo data set: drawn objects with exact boxes and masks."""
    from service import inventory

    for split in ("train", "val"):
        inventory.show_data(Console(), "demo", root, split, options or ())


@data_app.command("info")
def data_info(
    name: Annotated[str, typer.Argument(help="Data set: demo, folder, cifar10, ...")],
    root: Annotated[Path, typer.Option(help="Folder that holds it.")],
    split: Annotated[str, typer.Option(help="train, val, ...")] = "train",
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its options.")] = None,
) -> None:
    """Show what a data set holds: samples, classes, sizes, boxes, and its digest."""
    from service import inventory

    inventory.show_data(Console(), name, root, split, options or ())


@data_app.command("prepare")
def data_prepare(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that holds the data set.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to fill.", show_default=False)],
    options: DataOptions = None,
    name: Annotated[str, typer.Option(help="Data set that SRC holds: folder, demo, cifar10, ...")] = "folder",
    split: Annotated[list[str] | None, typer.Option(help="May be given again; default: train and val.")] = None,
    resize: Annotated[str, typer.Option(help="Side that becomes --size: short, long or none.")] = "short",
    size: Annotated[int, typer.Option(help="Pixels. Smaller images are not enlarged.", min=1)] = 256,
    quality: Annotated[int, typer.Option(help="Of JPEG files.", min=1, max=100)] = 90,
    format: Annotated[str, typer.Option(help="jpeg, png, or auto: PNG for rows of pixels only.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Most bytes of a shard, as 256MB.")] = "256MB",
    on_bad_image: Annotated[str, typer.Option(help="error, or skip: leave unreadable images out.")] = "error",
    workers: Annotated[int, typer.Option(help="Processes; 0: one for each core.", min=0)] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what was made otherwise, and begin anew.")] = False,
) -> None:
    """Resize a data set's images once, into WebDataset shards with a manifest and checksums.

    Interrupted, or out of disk, it goes on where it was when it is run again; so it does with shards that were lost.
    Train on the result with data.name=prepared data.root=DST.
    """
    from pipelines.resizing import Recipe
    from service import inventory
    from service.data import preparation

    try:
        shard_bytes = preparation.parse_size(shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shard-size") from None
    preparation.run(
        Console(),
        name,
        source,
        destination,
        split or ["train", "val"],
        inventory.parse_options(options or ()),
        Recipe(resize, size, quality, format),
        shard_bytes=shard_bytes,
        on_bad_image=on_bad_image,
        workers=workers,
        restart=restart,
    )


@data_app.command("verify")
def data_verify(
    root: Annotated[Path, typer.Argument(help="Folder of a prepared or another data set.", show_default=False)],
    options: DataOptions = None,
    name: DataName = None,
    split: Annotated[list[str] | None, typer.Option(help="May be given again; default: all there are.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image as well: slower, finds more.")] = False,
) -> None:
    """Look at every byte of a data set and list what is damaged; exit code 3 if anything is."""
    from service import inventory
    from service.data import verification

    if not verification.run(Console(), root, name, split or (), inventory.parse_options(options or ()), decode):
        raise typer.Exit(3)


@data_app.command("stats")
def data_stats(
    root: Annotated[Path, typer.Argument(help="Folder that holds the data set.", show_default=False)],
    options: DataOptions = None,
    name: DataName = None,
    split: Annotated[list[str] | None, typer.Option(help="May be given again; default: all there are.")] = None,
) -> None:
    """Count a data set: samples per class, sizes in pixels and bytes, boxes, formats."""
    from pipelines import datasets
    from service import inventory
    from service.data import statistics, verification

    chosen = verification.data_set_of(root, name)
    for number, own in enumerate(verification.splits_of(root, chosen, split or ())):
        manifest = datasets.load(chosen, root, own, **inventory.parse_options(options or ()))
        if number:
            typer.echo()
        statistics.show(Console(), manifest)


@data_app.command("show")
def data_show(
    place: Annotated[
        Path, typer.Argument(metavar="CONFIG|ROOT", help="Configuration, or folder of a data set.", show_default=False)
    ],
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="Default: the one that is trained on.")] = None,
    count: Annotated[int, typer.Option(help="Samples.", min=1)] = 12,
    epoch: Annotated[int, typer.Option(help="Whose draws are shown.", min=0)] = 0,
    first: Annotated[int, typer.Option(help="Position in the epoch's order to begin at.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="A .png or .html file.")] = Path("samples.png"),
) -> None:
    """Draw what training does to samples: window and turned box on the source, beside what the network is given.

    As in `lorot data show configs/train/imagenet-lorot_e.yaml` or `lorot data show FOLDER pretext.name=lorot_i`.
    """
    from service.data import pictures

    pictures.show(Console(), place, overrides or (), split=split, count=count, epoch=epoch, first=first, output=output)


@app.command()
def version() -> None:
    """Print the versions of lorot and of what it stands on."""
    from service import provenance

    for name, number in (provenance.package_versions() | provenance.code_version()).items():
        typer.echo(f"{name} {number}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error becomes one message on stderr and its exit code."""
    try:
        app(arguments)
    except LorotError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error}\n`lorot --debug ...` shows where it comes from", 1)


def _fail(message: str, code: int) -> None:
    # A job's last words may be among it.
    if os.environ.get("LOROT_DEBUG"):
        sys.stderr.write(printable(traceback.format_exc(), kept="\n"))
    told = escape(printable(message, kept="\n"))
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {told}", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
