"""`lorot data show`: sources with the planned window and box drawn on them, beside what the network is given."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from pipelines import datasets, pretext, torch_reference
from pipelines.augment.operations import Operation
from pipelines.manifest import Manifest
from pipelines.plan import Plan, View
from pipelines.reading import Reader, Sample, Source, Training
from pipelines.soundness import UnsoundError
from service import config, config_file, pictures, splits
from service.data.verification import data_set_of
from service.errors import ConfigError, DataError, StorageError
from service.training import feeding

_TILE, _GAP, _LINE, _LINES, _COLUMNS = 220, 10, 16, 4, 3
_PAPER, _INK, _EMPTY, _WINDOW, _BOX = (255, 255, 255), (34, 34, 34), (230, 230, 230), (0, 150, 255), (255, 77, 77)
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5rem }}
figure {{ margin: 0; width: min-content }}
figure div {{ display: flex; gap: 6px; align-items: center }}
.window {{ color: #0096ff }} .box {{ color: #ff4d4d }}
</style>
<h1>{title}</h1>
<p>Left the source with the <b class="window">window</b> that is cut out and the <b class="box">box</b> that is turned;
right what the network is given.</p>
<main>
{figures}
</main>
</html>
"""


def job_of(place: Path, overrides: Sequence[str]) -> config.JobConfig:
    """The configuration in a file; or one for the data set in a folder. `overrides` come on top of either."""
    if not place.is_dir():
        return config.load(place, list(overrides))
    values: dict[str, Any] = {
        "data": {"name": data_set_of(place, None), "root": str(place)},
        "pretext": {"name": "lorot_i"},
    }
    for override in overrides:
        config_file.assign(values, override)
    # A configuration that makes sense needs a use for the pretext task; nothing is trained here.
    objective = "supervised" if values["pretext"].get("name") == "none" else "multi_task"
    values.setdefault("objective", {}).setdefault("name", objective)
    return config.resolve(values, str(place))


def show(
    console: Console,
    place: Path,
    overrides: Sequence[str],
    *,
    split: str | None,
    count: int,
    epoch: int,
    first: int,
    output: Path,
) -> None:
    """Write a picture or a page of samples as training with the configuration sees them: order, draws, size.

    Args:
        place: a configuration, or a folder that holds a data set.
        split: the one that is trained on, if none is given.
        count: so many samples.
        epoch: whose draws are shown.
        first: position in the epoch to begin at; an epoch has as many positions as samples are trained on.
        output: a .png or .html file.
    """
    if output.suffix.lower() not in (".png", ".html"):
        raise ConfigError(f"{output}: write the name of a .png or .html file")
    job = job_of(place, overrides)
    split = split or job.data.train_split
    splits.use_cache(job)
    manifest = datasets.load(job.data.name, job.data.root, split, **job.data.options)
    task = pretext.load(job.pretext.name, **job.pretext.options)
    source = feeding.train_source(job, manifest, task)
    count = min(count, len(source.sequence))
    rows = _rows(source, job.global_batch, epoch * len(source.sequence) + first, count)
    title = f"{manifest.name} {split}, pretext {job.pretext.name}, epoch {epoch}"
    try:
        if output.suffix.lower() == ".png":
            _sheet(rows).save(output, optimize=True)
        else:
            output.write_text(_page(rows, title), "utf-8")
    except OSError as error:
        raise StorageError(f"{output}: cannot be written ({error.strerror}); choose another place") from None
    console.print(f"{output}: {count} samples of {title}", markup=False, highlight=False)


class _Row(NamedTuple):
    """A sample: the source with the plan drawn on it, what becomes of it (both (_TILE, _TILE) or less), and words."""

    source: Image.Image
    result: Image.Image
    lines: list[str]


def _rows(source: Source, global_batch: int, first: int, count: int) -> list[_Row]:
    """`count` positions of the stream that training reads, from position `first` on."""
    # One worker with batches of one sample: batch i is position i, whatever the job's own workers share out.
    schedule = Training(
        source.sequence,
        start_step=0,
        stop_step=-(-(first + count) // global_batch),
        global_batch=global_batch,
        micro_batch=1,
        rank=0,
        world_size=1,
        repeats=source.repeats,
    )
    reader = Reader(source, schedule)
    rows = []
    for index in range(first, first + count):
        slots = reader.slots(index)
        wanted = int(slots.ids[0])
        try:
            work = reader.complete(index, slots, {wanted: reader.read(wanted)}, reader.read)
            rows.append(_row(source.manifest, source.view, work.plan, work.samples[0], wanted))
        except (DataError, UnsoundError, OSError, SyntaxError, ValueError) as error:
            empty = Image.new("RGB", (_TILE, _TILE), _EMPTY)
            rows.append(_Row(empty, empty, [_title(source.manifest, wanted), "unreadable", str(error)]))
    return rows


def _title(manifest: Manifest, sample: int) -> str:
    return f"{sample}: {manifest.classes[int(manifest.labels[sample])]}"


def _row(manifest: Manifest, view: View, own: Plan, data: Sample, wanted: int) -> _Row:
    """One planned sample, which stands in for the `wanted` one if that could not be read."""
    sample = int(own.ids[0])
    lines = [_title(manifest, sample) + (f", in place of unreadable {wanted}" if sample != wanted else "")]
    pixels = torch_reference.decode(data) if isinstance(data, bytes) else data
    image = torch_reference.render_batch([data], view, own).numpy()
    window, flip, turns = own.windows[0].tolist(), bool(own.flips[0]), int(own.turns[0])
    box = own.boxes[0].tolist()
    overlay = _overlay(pixels, window, _on_source(box, window, own.size, flip) if turns else None)
    result = Image.fromarray(pictures.denormalise(image, view.mean, view.std)[0])
    result = result.resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    if turns:
        _frame(ImageDraw.Draw(result), [value * _TILE / own.size for value in _corners(box)], _BOX)
    lines.append(f"{pixels.shape[1]} x {pixels.shape[0]}, window {window[3]} x {window[2]}")
    lines.append(", ".join([f"turned {90 * turns}°" if turns else "not turned", *(["mirrored"] if flip else [])]))
    done = [Operation(code).name.lower() for code in own.ops[0].tolist() if code]
    return _Row(overlay, result, [*lines, *([", ".join(done)] if done else [])])


def _overlay(pixels: np.ndarray, window: Sequence[float], box: Sequence[float] | None) -> Image.Image:
    """The source, as large as a tile, with the window and what of it is turned."""
    factor = _TILE / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    scale = size[0] / pixels.shape[1], size[1] / pixels.shape[0]
    draw = ImageDraw.Draw(image)
    y, x, height, width = window
    for corners, colour in (((x, y, x + width, y + height), _WINDOW), (box, _BOX)):
        if corners is not None:
            _frame(draw, [value * scale[index % 2] for index, value in enumerate(corners)], colour)
    return image


def _on_source(box: Sequence[float], window: Sequence[float], size: int, flip: bool) -> tuple[float, ...]:
    """Corners (x_min, y_min, x_max, y_max) in source pixels of a box (y, x, side) of the rendered image."""
    y, x, side = box
    x = size - x - side if flip else x
    top, left, height, width = window
    across, down = width / size, height / size
    return left + x * across, top + y * down, left + (x + side) * across, top + (y + side) * down


def _corners(box: Sequence[float]) -> tuple[float, ...]:
    y, x, side = box
    return x, y, x + side, y + side


def _frame(draw: ImageDraw.ImageDraw, corners: Sequence[float], colour: tuple[int, int, int]) -> None:
    x_min, y_min, x_max, y_max = corners
    # The last pixel that belongs to it; never less than the first.
    draw.rectangle((x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)), outline=colour, width=2)


def _sheet(rows: Sequence[_Row]) -> Image.Image:
    columns = min(_COLUMNS, len(rows))
    wide, tall = 2 * _TILE + 3 * _GAP, _TILE + _LINES * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (columns * wide, -(-len(rows) // columns) * tall), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, row in enumerate(rows):
        left, top = index % columns * wide + _GAP, index // columns * tall + _GAP
        sheet.paste(row.source, (left + (_TILE - row.source.width) // 2, top + (_TILE - row.source.height) // 2))
        sheet.paste(row.result, (left + _TILE + _GAP, top))
        for number, line in enumerate(row.lines[:_LINES]):
            draw.text((left, top + _TILE + 4 + number * _LINE), _cut(line, font), fill=_INK, font=font)
    return sheet


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of a line as fits below a pair of pictures."""
    most = 2 * _TILE + _GAP
    if font.getlength(line) <= most:
        return line
    return next(f"{line[:end]}…" for end in range(len(line), 0, -1) if font.getlength(f"{line[:end]}…") <= most)


def _page(rows: Sequence[_Row], title: str) -> str:
    figures = "\n".join(
        f"<figure><div>{_image('source', row.source)}{_image('input', row.result)}</div>"
        f"<figcaption>{'<br>'.join(escape(line) for line in row.lines)}</figcaption></figure>"
        for row in rows
    )
    return _PAGE.format(title=escape(title), figures=figures)


def _image(about: str, image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img alt="{about}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
