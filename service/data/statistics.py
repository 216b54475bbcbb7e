"""`lorot data stats`: counts, sizes, bytes, boxes and formats of a split."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import listing
from pipelines.amounts import shown_bytes
from pipelines.errors import DataError
from pipelines.manifest import Manifest

_QUANTILES = (0, 0.05, 0.5, 0.95, 1)
# Formats are told by the first bytes of so many samples, spread over the split.
_LOOKED_AT = 1000
_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


def show(console: Console, manifest: Manifest, classes_shown: int = 10) -> None:
    """Print what a split is made of.

    Args:
        classes_shown: so many of the largest and of the smallest classes.
    """
    labels, what = manifest.labels, "samples"
    if manifest.instances is not None:
        labels, what = manifest.instances.labels, "objects"
    counts = np.bincount(labels, minlength=len(manifest.classes))
    known = manifest.heights > 0
    heights, widths = manifest.heights[known], manifest.widths[known]
    about = Table.grid(padding=(0, 2))
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    about.add_row(f"{manifest.name} {manifest.split}", f"{len(manifest):,} samples in {manifest.root}")
    about.add_row(
        "classes",
        f"{len(counts):,}: {counts.min():,} {what} in the smallest, {np.median(counts):,.0f} median, "
        f"{counts.max():,} in the largest",
    )
    if not known.all():
        about.add_row("unreadable", f"{np.count_nonzero(~known):,} headers")
    about.add_row("formats", _formats(manifest))
    has_masks = manifest.has_masks or (manifest.instances is not None and manifest.instances.has_segmentations)
    about.add_row("masks", "yes" if has_masks else "no")
    about.add_row("digest", manifest.digest)
    console.print(about, markup=False, highlight=False)

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("smallest", "5 %", "median", "95 %", "largest", "mean"):
        table.add_column(name, justify="right")
    if known.any():
        _add(table, "height, pixels", heights)
        _add(table, "width, pixels", widths)
        _add(table, "short side, pixels", np.minimum(heights, widths))
        _add(table, "width / height", widths / heights, "{:.2f}")
    sizes = sample_bytes(manifest)
    if sizes is not None and len(sizes):
        _add(table, f"kB a sample ({shown_bytes(float(sizes.sum()))} in all)", sizes / 1000, "{:,.1f}")
    if manifest.has_boxes:
        numbers, shares = _boxes(manifest)
        _add(table, f"boxes a sample ({numbers.sum():,} in all)", numbers)
        if len(shares):
            _add(table, "box, % of the image", 100 * shares, "{:.1f}")
    console.print()
    console.print(table, markup=False, highlight=False)
    console.print()
    console.print(_classes(manifest.classes, counts, classes_shown), markup=False, highlight=False)


def sample_bytes(manifest: Manifest) -> np.ndarray | None:
    """(n,) bytes of the samples' files; None for rows of an array, and for files below a URL."""
    if manifest.sizes is not None:
        return manifest.sizes
    if not manifest.encoded or isinstance(manifest.root, str):
        return None
    root = manifest.root

    def measure(start: int) -> list[int]:
        paths = (manifest.location(sample)[0] for sample in range(start, min(start + 256, len(manifest))))
        return [file.size for path in paths if (file := listing.file(root, path)) is not None]

    with ThreadPoolExecutor(listing.READERS) as pool:
        return np.array([size for sizes in pool.map(measure, range(0, len(manifest), 256)) for size in sizes], np.int64)


def _add(table: Table, name: str, values: np.ndarray, form: str = "{:,.0f}") -> None:
    numbers = [*np.quantile(values, _QUANTILES, method="nearest"), values.mean()]
    table.add_row(name, *(form.format(number) for number in numbers[:-1]), f"{numbers[-1]:,.4g}")


def _formats(manifest: Manifest) -> str:
    if not manifest.encoded:
        return "rows of pixels"
    looked_at = range(0, len(manifest), max(1, len(manifest) // _LOOKED_AT))
    found: Counter[str] = Counter()
    for sample in looked_at:
        path, offset, _ = manifest.location(sample)
        try:
            start = manifest.files.read(path, offset, 8)
        except DataError:
            start = b""
        found[next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), "unknown")] += 1
    shares = ", ".join(f"{name} {count / len(looked_at):.3g}" for name, count in found.most_common())
    if len(found) == 1:
        shares = next(iter(found))
    return f"{shares} (of {len(looked_at):,} looked at)" if len(looked_at) < len(manifest) else shares


def _boxes(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """(N,) boxes of each sample, and the share of its image that each box covers."""
    numbers, shares = np.zeros(len(manifest), np.int64), []
    for sample in range(len(manifest)):
        boxes = manifest.boxes(sample)
        numbers[sample] = len(boxes)
        area = int(manifest.heights[sample]) * int(manifest.widths[sample])
        if area:
            shares.append((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / area)
    return numbers, np.concatenate([np.zeros(0), *shares])


def _classes(names: Sequence[str], counts: np.ndarray, shown: int) -> Table:
    order = np.argsort(-counts, kind="stable")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    rows = list(order) if len(order) <= 2 * shown else [*order[:shown], None, *order[-shown:]]
    for label in rows:
        if label is None:
            table.add_row("...", f"{len(order) - 2 * shown:,} more")
        else:
            table.add_row(f"{counts[label]:,}", names[label])
    return table
