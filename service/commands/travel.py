"""`lorot export` and `lorot import`: models that leave for other tools, and weights that come from them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/.")]
_IMAGENET_MEAN, _IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


def add_to(app: typer.Typer) -> None:
    """Make both commands of `app`."""
    app.command("export")(export)
    app.command("import")(import_weights)


def export(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.")],
    to: Annotated[str, typer.Option(help="torchvision, timm, onnx, safetensors or pytorch.")],
    output: Annotated[Path, typer.Option(help="The file; a JSON with classes, preprocessing, lineage goes beside it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a model as a file of another tool, and compare that tool's logits with ours before it is left there.

    torchvision, timm and ONNX have no place for the pretext head; safetensors and pytorch keep it.
    As in `lorot export --model models:/NAME@best --to onnx --output model.onnx`.
    """
    from service.export import job

    job.show(job.run(model, to, output, overwrite=overwrite, tracking_uri=tracking_uri), Console())


def import_weights(
    file: Annotated[Path, typer.Argument(help="A .pth, .pt, .pth.tar or .safetensors file.", show_default=False)],
    name: Annotated[str, typer.Option(help="The registered model's name.")],
    model: Annotated[str | None, typer.Option(help="Network; default: the one whose layers fit.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="imagenet, a file of names, or a,b,c; default: imagenet for 1000 outputs.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set to evaluate on; the classes are its own.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    pretext: Annotated[
        str | None, typer.Option(help="Task of the pretext head; default: by its outputs; none leaves it out.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the network's input, pixels.", min=1, max=8192)] = 224,
    crop: Annotated[
        str, typer.Option(help="random_resized: a centre square; whole, pad: the whole image.")
    ] = "random_resized",
    eval_crop: Annotated[
        float, typer.Option(help="Side of the centre square, as a share of the short side.", min=0.01, max=1)
    ] = 0.875,
    mean: Annotated[str, typer.Option(help="Of R,G,B on a scale of 0 to 1.")] = _IMAGENET_MEAN,
    std: Annotated[str, typer.Option(help="Of R,G,B on a scale of 0 to 1.")] = _IMAGENET_STD,
    origin: Annotated[str, typer.Option(help="Where the file is from, to be recorded.")] = "",
    entry: Annotated[str | None, typer.Option(help="Entry of the file that holds the weights.")] = None,
    tracking_uri: TrackingUri = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The data set's options.", show_default=False)
    ] = None,
) -> None:
    """Register weights that others have trained: torchvision's, timm's, or a published checkpoint of LoRot's.

    Nothing but tensors is loaded. The preprocessing is ImageNet's usual one unless it is said otherwise.
    As in `lorot import lorot_e.pth.tar --name published --data folder --root /path/to/imagenet`.
    """
    from pipelines.plan import View
    from service import inventory
    from service.importing import job

    view = View(
        size=size, crop=crop, eval_crop=eval_crop, mean=_three("--mean", mean, 0), std=_three("--std", std, 1e-6)
    )
    wish = job.Wish(
        network=model,
        classes=classes,
        data=data,
        root=root,
        split=split,
        data_options=inventory.parse_options(options or ()),
        pretext=pretext,
        view=view,
        origin=origin,
        entry=entry,
    )
    job.show(job.run(file, name, wish, tracking_uri=tracking_uri), Console())


def _three(option: str, text: str, least: float) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        red = green = blue = -1.0
    if not all(least <= value <= 1 for value in (red, green, blue)):
        raise typer.BadParameter(
            f"{text!r}: three numbers within 0 and 1 are wanted, as 0.5,0.5,0.5", param_hint=option
        )
    return red, green, blue
