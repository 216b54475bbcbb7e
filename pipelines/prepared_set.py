"""What a prepared data set says of itself: `set.json`, which names its splits, their shards and how they were made."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import cache
from pipelines.errors import DataError
from pipelines.files import Files

NAME = "set.json"
FORMAT = 1
MEND = (
    "run `lorot data prepare` with the same source and options again: it makes anew what is missing and keeps the rest"
)


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
    return parse(files.read(NAME), where)


def parse(content: bytes, where: str) -> dict[str, Split]:
    """The splits that a `set.json` with this content speaks of; raises DataError if it is not sound."""
    try:
        about = json.loads(content)
        if about["format"] != FORMAT:
            raise DataError(f"{where}/{NAME}: made by another version of this program; prepare the set again")
        return {name: _split(values) for name, values in about["splits"].items()}
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where}/{NAME}: damaged ({type(error).__name__}: {error}); delete it and run `lorot data prepare` again, "
            "which keeps the shards that are whole"
        ) from None


def write(root: Path, splits: dict[str, Split]) -> None:
    """Write `set.json`; it is whole or as it was."""
    about = {"format": FORMAT, "splits": {name: asdict(split) for name, split in sorted(splits.items())}}
    with cache.replacing(root / NAME) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_known(manifest: Path, shards: tuple[File, ...]) -> None:
    """Note beside a copied manifest what its shards are, for the processes that open the manifest alone."""
    with cache.replacing(_known(manifest)) as partial:
        partial.write_text(json.dumps({shard.path: (shard.bytes, shard.sha256) for shard in shards}), encoding="utf-8")


def read_known(manifest: Path) -> Mapping[str, tuple[int, str]]:
    """What `write_known` noted: path -> (bytes, sha256 in hex); nothing if it noted nothing."""
    try:
        about = json.loads(_known(manifest).read_bytes())
        return {path: (int(size), str(digest)) for path, (size, digest) in about.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{_known(manifest)}: damaged ({error}); delete it, and start again") from None


def _known(manifest: Path) -> Path:
    return manifest.with_suffix(".shards.json")


def _split(values: dict[str, Any]) -> Split:
    lists = {name: tuple(str(one) for one in values[name]) for name in ("classes", "class_ids")}
    shards = tuple(_file(shard) for shard in values["shards"])
    skipped = tuple((str(where), str(why)) for where, why in values["skipped"])
    return Split(**values | lists | {"manifest": _file(values["manifest"]), "shards": shards, "skipped": skipped})


def _file(values: dict[str, Any]) -> File:
    """A file of the set, which may come from anywhere: its path must not lead out, nor hide in a cache."""
    file = File(**values)
    if not file.path.isprintable() or re.fullmatch(r"[^./][^/]*", file.path) is None:
        raise ValueError(f"{file.path!r} is no name of a file of the set")
    if not isinstance(file.bytes, int) or file.bytes < 0 or re.fullmatch(r"[0-9a-f]{64}", file.sha256) is None:
        raise ValueError(f"{file.path}: {file.bytes!r} bytes with sha256 {file.sha256!r} are no file")
    return file
