"""What a prepared data set says of itself: `set.json`, which names its splits, their shards and how they were made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import cache
from pipelines.errors import DataError
from pipelines.files import Files

NAME = "set.json"
FORMAT = 1


@dataclass(frozen=True)
class File:
    """A file of the set: its path below the set's folder, its size and its sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split of a prepared set.

    Attributes:
        samples: how many.
        source_bytes, image_bytes: of the encoded images (or pixels) it was made from, and of those it holds.
        digest: of the prepared content, as `Manifest.digest`.
        source: name, split, digest and fingerprint of what it was made from.
        options: what it was made with.
        made_with: versions of the libraries that decoded, resized and encoded.
        classes, class_ids: by label.
        skipped: samples of the source that could not be read, (where, why).
        manifest: the split's Arrow file.
        shards: in the order of the samples.
    """

    samples: int
    source_bytes: int
    image_bytes: int
    digest: str
    source: dict[str, str]
    options: dict[str, Any]
    made_with: dict[str, str]
    classes: tuple[str, ...]
    class_ids: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    manifest: File
    shards: tuple[File, ...]


def read(files: Files, where: str) -> dict[str, Split]:
    """The splits of the set whose files are read through `files`; raises DataError if it has no sound `set.json`."""
    content = files.read(NAME)
    try:
        about = json.loads(content)
        if about["format"] != FORMAT:
            raise DataError(f"{where}/{NAME}: made by another version of this program; prepare the set again")
        return {name: _split(values) for name, values in about["splits"].items()}
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}/{NAME}: damaged ({type(error).__name__}: {error}); delete it and run `lorot data prepare` again, "
            "which keeps the shards that are whole"
        ) from None


def write(root: Path, splits: dict[str, Split]) -> None:
    """Write `set.json`; it is whole or as it was."""
    about = {"format": FORMAT, "splits": {name: asdict(split) for name, split in sorted(splits.items())}}
    with cache.replacing(root / NAME) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _split(values: dict[str, Any]) -> Split:
    lists = {name: tuple(values[name]) for name in ("classes", "class_ids")}
    shards = tuple(File(**shard) for shard in values["shards"])
    skipped = tuple((str(where), str(why)) for where, why in values["skipped"])
    return Split(**values | lists | {"manifest": File(**values["manifest"]), "shards": shards, "skipped": skipped})
