"""`lorot data verify`: looks at every byte of a data set and lists what is damaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import datasets, prepared_set
from pipelines.amounts import shown_bytes
from pipelines.files import LocalFiles
from pipelines.verification import Findings, verify_files, verify_prepared
from service import machine
from service.errors import DataError

_SHOWN = 100


def data_set_of(root: Path, name: str | None) -> str:
    """The data set's name: as given, or as the folder looks."""
    return name or ("prepared" if (root / prepared_set.NAME).exists() or (root / ".prepare").exists() else "folder")


def splits_of(root: Path, name: str, splits: Sequence[str]) -> list[str]:
    """The splits to look at: as given; or all of a prepared set, or train and val where they are folders."""
    if splits:
        return list(splits)
    if name == "prepared":
        if not (root / prepared_set.NAME).exists():
            datasets.load(name, root, "train")
        return list(prepared_set.read(LocalFiles(root), str(root)))
    there = [split for split in ("train", "val") if name != "folder" or any(root.glob(f"**/{split}/"))]
    return there or ["train"]


def run(
    console: Console, root: Path, name: str | None, splits: Sequence[str], options: dict[str, Any], decode: bool
) -> bool:
    """Look at the splits and print what is damaged; whether nothing is. Raises DataError if there is nothing to see."""
    chosen = data_set_of(root, name)
    whole = True
    for split in splits_of(root, chosen, splits):
        if chosen == "prepared":
            known = prepared_set.read(LocalFiles(root), str(root))
            if split not in known:
                raise DataError(f"{root}: no split {split!r}; there are {', '.join(known) or 'none'}")
            found = verify_prepared(root, split, known[split], decode=decode, threads=machine.cores())
        else:
            manifest = datasets.load(chosen, root, split, **options)
            found = verify_files(manifest, decode=decode, threads=machine.cores())
        _show(console, split, found)
        whole = whole and not found.damage
    if not whole and chosen == "prepared":
        console.print(
            "delete the damaged shards and run `lorot data prepare` with the same source and options again: it makes "
            "those anew and keeps the rest",
            markup=False,
        )
    return whole


def _show(console: Console, split: str, found: Findings) -> None:
    state = f"{len(found.damage):,} found damaged" if found.damage else "all whole"
    console.print(
        f"{split}: {found.samples:,} samples, {shown_bytes(found.bytes)}: {state}", markup=False, highlight=False
    )
    for damage in found.damage[:_SHOWN]:
        where = "" if damage.what.startswith(damage.where) else f"{damage.where}: "
        console.print(f"  {where}{damage.what}", markup=False, highlight=False, soft_wrap=True)
    if len(found.damage) > _SHOWN:
        console.print(f"  and {len(found.damage) - _SHOWN:,} more", markup=False)
