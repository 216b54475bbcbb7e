"""The `lorot` command. Every command imports what it needs when it runs, so that help and completion are quick."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from service.errors import EXIT_CODES, LorotError

app = typer.Typer(
    name="lorot",
    help="Train image classifiers with localizable rotation, register them, and ask them where things are.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Generate the demo data set, or show what a data set holds.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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
    workers: Workers = None,
    port: Annotated[
        int | None, typer.Option(help="Port the workers meet at; default: a free one.", min=1, max=65535)
    ] = None,
) -> None:
    """Train on this machine as CONFIG says, and register the model."""
    from service.jobs import local

    local.run(config, overrides or (), workers=workers, resume=resume, restart=restart, port=port, say=typer.echo)


@app.command(cls=ConfigCommand)
def check(config: Config, overrides: Overrides = None, workers: Workers = None) -> None:
    """Say what CONFIG amounts to: steps, batches, schedule, memory and storage. Starts nothing."""
    from service import check as checking
    from service import config as configuration

    findings = checking.examine(configuration.load(config, overrides or ()), workers)
    checking.show(findings, Console())
    if findings.missing:
        raise typer.Exit(3)


@app.command()
def doctor(tracking_uri: TrackingUri = None) -> None:
    """Say what this machine can do, and how to mend what it cannot."""
    from service import doctor as diagnosis

    findings = diagnosis.examine(tracking_uri)
    diagnosis.show(findings, Console())
    if diagnosis.fails(findings):
        raise typer.Exit(1)


@app.command()
def wsol(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.")],
    data: Annotated[str | None, typer.Option(help="Data set; default: the one it was trained on.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds the data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split; default: the one it was evaluated on.")] = None,
    axis: Annotated[str, typer.Option(help="Reading of table 9 to print first: cam or iou thresholds.")] = "cam",
    output: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    loader: Annotated[str, typer.Option(help="dali or torch.")] = "dali",
    tracking_uri: TrackingUri = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The data set's options.", show_default=False)
    ] = None,
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
        tracking_uri=tracking_uri,
        batch_size=batch_size,
        device=device,
        loader=loader,
        output=output,
        limit=limit,
    )
    job.show(result, Console())


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
    run: Annotated[Path, typer.Argument(help="Run folder, as runs/train.")], tracking_uri: TrackingUri = None
) -> None:
    """Send the records of a run that the tracking server has not got yet."""
    from service import tracking

    typer.echo(f"{tracking.sync(run, tracking_uri)} records sent")


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
    if os.environ.get("LOROT_DEBUG"):
        traceback.print_exc()
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
