"""`lorot data demo-coco`: scenes of drawn objects in COCO's format."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def add_to(app: typer.Typer) -> None:
    """Make the command one of `app`."""
    app.command("demo-coco")(demo_coco)


def demo_coco(
    root: Annotated[Path, typer.Argument(help="Folder to fill.", show_default=False)],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="As train_count=600 size=320.", show_default=False),
    ] = None,
) -> None:
    """Draw scenes of several objects that hide each other, in COCO's format, with exact boxes and masks.

    Options: train_count, val_count, size (of the longer side), classes, most (objects in a picture), seed.
    Use them with `--data coco --root FOLDER`.
    """
    from pipelines.drawing import coco_export
    from service import inventory
    from service.errors import ConfigError

    given = inventory.parse_options(options or ())
    known = [field.name for field in dataclasses.fields(coco_export.Scenes)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"demo-coco has no option {name!r}{hint}; it has {', '.join(known)}")
    coco_export.export(root, coco_export.Scenes(**given))
    for split in ("train", "val"):
        inventory.show_data(Console(), "coco", root, split)
