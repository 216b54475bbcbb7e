"""CIFAR's batch files, read without unpickling.

The published files are pickles, and a pickle can run any program when it is loaded. Here its instructions are only
listed (`pickletools.genops`), and the literal strings and numbers among them picked out: a dictionary's text key, then
what follows it. Nothing is looked up, called or built.
"""

import pickletools
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import array_store, listing, manifest
from pipelines.errors import DataError
from pipelines.manifest import Heading, Manifest, Rows

PIXELS = 3 * 32 * 32
_STRINGS = frozenset(
    {
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "STRING",
        "UNICODE",
    }
)
_INTEGERS = frozenset({"BININT", "BININT1", "BININT2", "INT", "LONG1"})
_LABELS = ("labels", "fine_labels", "coarse_labels")
_NAMES = ("label_names", "fine_label_names", "coarse_label_names")
_KEYS = frozenset({"data", "batch_label", "filenames", "num_vis", "num_cases_per_batch", *_LABELS, *_NAMES})


@dataclass(frozen=True)
class Release:
    """One published data set: its folder and archive names, and its files.

    Attributes:
        name: as in `datasets.load`; torchvision: its class there, for the message on how to fetch it.
        label_key, names_key: keys of the labels in a batch and of the class names in the `meta` file.
        splits: file names by split; the test set is also known as "val".
    """

    name: str
    torchvision: str
    folder: str
    archive: str
    meta: str
    label_key: str
    names_key: str
    num_classes: int
    splits: dict[str, tuple[str, ...]]


def literals(content: bytes, keys: frozenset[str]) -> dict[str, list[bytes | int]]:
    """The byte strings and integers that follow each of `keys` in a pickle, up to the next key.

    Raises:
        ValueError: it is no pickle, or cut short.
    """
    found: dict[str, list[bytes | int]] = {}
    current: list[bytes | int] = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _STRINGS and argument is not None:
            # genops shows Python 2's strings, pixels too, as latin-1 text; the keys are the same in any encoding.
            item = argument if isinstance(argument, bytes) else str(argument).encode("latin-1", errors="replace")
            if len(item) < 64 and (key := item.decode("latin-1")) in keys:
                current = found.setdefault(key, [])
            else:
                current.append(item)
        elif opcode.name in _INTEGERS and argument is not None:
            current.append(int(argument))
    return found


def load(release: Release, root: Path, split: str) -> Manifest:
    """The manifest of a split of CIFAR-10 or CIFAR-100; its pixels are converted once into an array.

    Raises:
        DataError: the files are missing (it tells how to fetch them) or damaged, or there is no such split.
    """
    if split not in release.splits:
        raise DataError(f"data set {release.name!r} has no split {split!r}; it has {', '.join(release.splits)}")
    wanted = [f"{release.folder}/{name}" for name in (*release.splits[split], release.meta)]
    sources = [listing.file(root, path) for path in wanted]
    archive = listing.file(root, release.archive)
    if all(sources):
        present = [source for source in sources if source]
    elif archive:
        present = [archive]
    else:
        files = ", ".join((*release.splits[split], release.meta))
        raise DataError(
            f"{root}: neither {release.folder} with {files} nor {release.archive}; fetch them with: "
            f'python -c "import torchvision; torchvision.datasets.{release.torchvision}'
            f"('{root}', download=True)\""
        )
    fingerprint = listing.fingerprint(present, wanted)
    source = root / release.archive if present == [archive] else root

    def build(kept: Path) -> tuple[Heading, Rows]:
        return _build(release, source, wanted, split, fingerprint, kept)

    return manifest.cached(root, release.name, split, "", fingerprint, build)


def _build(
    release: Release, source: Path, wanted: list[str], split: str, fingerprint: str, kept: Path
) -> tuple[Heading, Rows]:
    found = {path: _literals(source, path, content) for path, content in _contents(source, wanted).items()}
    batches = [_batch(source, path, found[path], release) for path in wanted[:-1]]
    pixels = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([numbers for _, numbers in batches])
    names = [name for name in found[wanted[-1]].get(release.names_key, []) if isinstance(name, bytes)]
    if len(names) != release.num_classes or labels.min() < 0 or labels.max() >= release.num_classes:
        raise DataError(
            f"{source}: {len(names)} class names and labels {labels.min()} to {labels.max()}, "
            f"where {release.name} has {release.num_classes} classes; fetch the files again"
        )
    classes = tuple(name.decode("latin-1") for name in names)
    array = array_store.store(kept, f"{release.name}-{split}", fingerprint, pixels)
    digest = listing.digest([*classes, labels, pixels])
    side = np.full(len(labels), 32, np.int64)
    return Heading(release.name, split, classes, classes, digest, fingerprint, array=array), Rows(labels, side, side)


def _contents(source: Path, wanted: list[str]) -> dict[str, bytes]:
    """The wanted files of a folder, or of an archive, which is read once from front to back."""
    path = source
    try:
        if source.is_dir():
            return {name: (path := source / name).read_bytes() for name in wanted}
        contents = {}
        with tarfile.open(source, "r|gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.name in wanted else None
                if stream is not None:
                    contents[member.name] = stream.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from None
    missing = [name for name in wanted if name not in contents]
    if missing:
        raise DataError(f"{source}: holds no {missing[0]}; fetch it again")
    return contents


def _literals(source: Path, path: str, content: bytes) -> dict[str, list[bytes | int]]:
    try:
        return literals(content, _KEYS)
    except (ValueError, IndexError) as error:
        raise DataError(f"{source}, {path}: damaged ({error}); fetch it again") from None


def _batch(
    source: Path, path: str, found: dict[str, list[bytes | int]], release: Release
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 pixels and (N,) int64 labels of one batch file, whose pixels are stored as planes."""
    pixels = max((item for item in found.get("data", []) if isinstance(item, bytes)), key=len, default=b"")
    labels = [item for item in found.get(release.label_key, []) if isinstance(item, int)]
    if not labels or len(pixels) != PIXELS * len(labels):
        raise DataError(
            f"{source}, {path}: {len(pixels)} bytes of pixels for {len(labels)} labels under {release.label_key!r}; "
            f"no batch of {release.name}, or a damaged one: fetch it again"
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(labels, np.int64)
