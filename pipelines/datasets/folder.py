"""Class folders, ImageNet included: any of these layouts, with image files of any usual format.

    ROOT/train/CLASS/any.jpg                      class folders, for every split
    ROOT/train/n01440764/n01440764_10026.JPEG     ImageNet with the validation images sorted into folders
    ROOT/[ILSVRC/]Data/CLS-LOC/train/n01440764/n01440764_10026.JPEG
    ROOT/[ILSVRC/]Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG      labels from the annotations

ImageNet comes from https://image-net.org (free for research, after registration): ILSVRC2012's classification
archives, or the Object Localization Challenge's one archive, which is the last layout as it is.
Boxes are read from `Annotations/CLS-LOC/SPLIT/[CLASS/]STEM.xml` beside `Data` or in ROOT, or else from the challenge's
table `LOC_SPLIT_solution.csv` in ROOT or beside `Data`, if there; an image may have several. A file in a class folder
is about the image of that name in the same class folder; one beside such folders, and a row of the table, is about the
one image of the split with this stem, or says which as CLASS/STEM. Readable class names come from
`LOC_synset_mapping.txt` ("n01440764 tench, Tinca tinca"), if there; a folder's name is the class id.

A file's name only says whether it is one of the images; its format is told by its content. Sizes and boxes are those
of the image as it is shown, EXIF orientation applied.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines import cls_loc, listing, manifest
from pipelines.errors import DataError
from pipelines.listing import File
from pipelines.manifest import Heading, Manifest, Rows

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Goes up when the same files give other rows, so that manifests made before are made anew. 2: EXIF is applied. 3: no
# image has the boxes of another one of its name.
_READING = 3
# Annotations that a thread reads in one go: handing over single files would cost more than reading them.
_CHUNK = 256
_BASES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_MAPPING = "LOC_synset_mapping.txt"
_TABLE = ".csv"


@dataclass(frozen=True)
class _Found:
    """What is on disk for one split: its folder, all classes, files by class (or flat), annotation and name files.

    `annotated` is the folder that the annotations are in, or the table.
    """

    folder: str
    classes: tuple[str, ...]
    images: tuple[tuple[str, list[File]], ...]
    flat: list[File]
    annotations: list[File]
    annotated: str
    names: File | None


def load(root: Path, split: str, *, annotations: str | None = None) -> Manifest:
    """The manifest of one split.

    Args:
        root: folder in one of the layouts above.
        split: name of the split's folder. Labels count the sorted class folders of `train`, if there is such a split.
        annotations: folder of the split's CLS-LOC XML files, or a table as LOC_val_solution.csv, relative to `root`;
            found by itself where ImageNet has it.

    Raises:
        DataError: no such split, an empty class folder, a class that `train` does not have, a bad annotation, one that
            may be about several images, or annotations of which none is about an image of the split.
    """
    found = _find(root, split, annotations)
    every = [*found.flat, *(file for _, files in found.images for file in files), *found.annotations]
    every += [found.names] if found.names else []
    fingerprint = listing.fingerprint(every, _READING, found.folder, found.classes)

    def build(_: Path) -> tuple[Heading, Rows]:
        return _build(root, split, found, fingerprint)

    return manifest.cached(root, "folder", split, f"{annotations}", fingerprint, build)


def _find(root: Path, split: str, annotations: str | None) -> _Found:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data set 'folder' wants {root}/{split}/CLASS/*.jpg")
    # An empty name would be the root itself, and its splits the classes.
    parts = PurePosixPath(split).parts
    named = bool(parts) and not {"..", "/"} & set(parts)
    base = next((base for base in _BASES if named and (root / base / split).is_dir()), None)
    if base is None:
        there = sorted({name for base in _BASES for name in listing.folders(root, base)} - {"Data", "ILSVRC"})
        raise DataError(
            f"{root}: no split {split!r}; folders there: {', '.join(there[:20]) or 'none'}. "
            f"Wanted: {root}/{split}/CLASS/*.jpg, or ImageNet's {root}/ILSVRC/Data/CLS-LOC/{split}"
        )
    folder = str(PurePosixPath(base) / split)
    own = listing.folders(root, folder)
    with ThreadPoolExecutor(listing.READERS) as pool:
        per_class = list(pool.map(lambda name: listing.files(root, f"{folder}/{name}", ENDINGS), own))
    empty = [name for name, files in zip(own, per_class, strict=True) if not files]
    if empty:
        raise DataError(
            f"{root / folder / empty[0]}: a class folder without an image ({', '.join(ENDINGS)})"
            + (f", as are {len(empty) - 1} more" if len(empty) > 1 else "")
            + "; fill or remove it"
        )
    flat = [] if own else listing.files(root, folder, ENDINGS)
    if not own and not flat:
        raise DataError(f"{root / folder}: holds neither class folders nor images")
    classes = listing.folders(root, str(PurePosixPath(base) / "train")) or own
    strange = sorted(set(own) - set(classes))
    if strange:
        raise DataError(f"{root / folder / strange[0]}: no such class in {root / base / 'train'}; rename or remove it")
    annotated, notes = _find_annotations(root, base, split, annotations)
    mappings = (_MAPPING, f"{base}/{_MAPPING}", f"ILSVRC/{_MAPPING}")
    return _Found(
        folder=folder,
        classes=tuple(classes),
        images=tuple(zip(own, per_class, strict=True)),
        flat=flat,
        annotations=notes,
        annotated=annotated,
        names=next((file for path in mappings if (file := listing.file(root, path))), None),
    )


def _find_annotations(root: Path, base: str, split: str, given: str | None) -> tuple[str, list[File]]:
    """Where the XML files are and which, or the one table that stands for them; an empty folder hides no table."""
    beside = base.removesuffix("Data/CLS-LOC")
    usual = [f"{beside}Annotations/CLS-LOC/{split}", f"Annotations/CLS-LOC/{split}"]
    tables = [f"LOC_{split}_solution.csv", f"{beside}LOC_{split}_solution.csv"]
    if given is not None:
        given = str(PurePosixPath(given))
        usual, tables = [given], [given] if given.endswith(_TABLE) else []
    for place in usual:
        if (root / place).is_dir() and (files := listing.files(root, place, (".xml",))):
            return place, files
    table = next((file for path in tables if (file := listing.file(root, path))), None)
    if table is None and given is not None:
        problem = (
            "holds no XML file" if (root / given).is_dir() else "no such folder of annotations, and no table of them"
        )
        raise DataError(f"{root / given}: {problem}; leave the option out without any")
    return (table.path, [table]) if table is not None else ("", [])


def _build(root: Path, split: str, found: _Found, fingerprint: str) -> tuple[Heading, Rows]:
    images = found.flat or [file for _, files in found.images for file in files]
    paths = [file.path for file in images]
    read = _read_annotations(root, found, paths)
    class_ids = found.classes
    if found.flat:
        synsets = [_synset(root / path, note) for path, note in zip(paths, read, strict=True)]
        class_ids = class_ids or tuple(sorted(set(synsets)))
    else:
        synsets = [name for name, files in found.images for _ in files]
    index = {name: label for label, name in enumerate(class_ids)}
    for path, synset in zip(paths, synsets, strict=True):
        if synset not in index:
            raise DataError(
                f"{root / path}: its annotation says {synset!r}, which is no class folder of the train split"
            )
    labels = np.array([index[synset] for synset in synsets], np.int64)
    headers = listing.read_headers(root, paths)
    boxes = counts = None
    if found.annotations:
        shown = zip(read, headers.heights, headers.widths, headers.orientations, strict=True)
        fitted = [cls_loc.fit(note, *map(int, how)) if note else np.zeros((0, 4), np.float32) for note, *how in shown]
        boxes = np.concatenate(fitted)
        counts = np.array([len(own) for own in fitted], np.int64)
    inside = len(found.folder) + 1
    digest = listing.digest(
        [
            *class_ids,
            *(f"{file.path[inside:]} {file.size}" for file in images),
            *(labels, headers.heights, headers.widths, headers.hashes),
            *((boxes, counts) if boxes is not None else ()),
        ]
    )
    classes = _readable(class_ids, (root / found.names.path) if found.names else None)
    heading = Heading("folder", split, classes, class_ids, digest, fingerprint)
    return heading, Rows(labels, headers.heights, headers.widths, paths, box_counts=counts, boxes=boxes)


def _read_annotations(root: Path, found: _Found, paths: list[str]) -> list[cls_loc.Annotation | None]:
    """The annotation of each image, or None where there is none."""
    if not found.annotations:
        return [None] * len(paths)
    where = root / found.annotated
    if found.annotated.endswith(_TABLE) and found.annotations[0].path == found.annotated:
        table = cls_loc.read_solution(where)
        return [table[name] if name else None for name in _join(where, {name: name for name in table}, found, paths)]
    by_name: dict[str, str] = {}
    classes = set() if found.flat else set(found.classes)
    for file in found.annotations:
        name = _annotated_name(file.path[len(found.annotated) + 1 :], classes)
        if by_name.setdefault(name, file.path) != file.path:
            raise DataError(f"{root / file.path}: {root / by_name[name]} is about the same image; keep one of them")
    notes = _join(where, by_name, found, paths)

    def read(start: int) -> list[cls_loc.Annotation | None]:
        return [cls_loc.read(root / note) if note else None for note in notes[start : start + _CHUNK]]

    with ThreadPoolExecutor(listing.READERS) as pool:
        return list(itertools.chain.from_iterable(pool.map(read, range(0, len(notes), _CHUNK))))


def _annotated_name(inside: str, classes: set[str]) -> str:
    """Which image an XML file is about: CLASS/STEM if it is in a folder, as images of `classes` are; else the stem."""
    *folders, name = inside.split("/")
    if not classes:
        return _stem(name)
    first = next((place for place, one in enumerate(folders) if one in classes), 0)
    return "/".join([*folders[first:], _stem(name)])


def _join(where: Path, by_name: Mapping[str, str], found: _Found, paths: list[str]) -> list[str | None]:
    """For each image what `by_name` has under its CLASS/STEM, or under its stem.

    Raises:
        DataError: a name is that of several images, or none is an image's.
    """
    joined: list[str | None] = []
    about: dict[str, str] = {}
    for path in paths:
        inside = _stem(path[len(found.folder) + 1 :])
        names = [name for name in (inside, inside.rpartition("/")[2]) if name in by_name]
        for name in names:
            if about.setdefault(name, path) != path:
                raise DataError(
                    f"{where}: {name!r} may be about {about[name]} or {path}; name the image in a table as CLASS/STEM, "
                    "sort XML files into class folders as the images are, or give images names of their own"
                )
        joined.append(by_name[names[0]] if names else None)
    if not about:
        raise DataError(
            f"{where}: is about none of the {len(paths)} images in {found.folder}, as {paths[0]}; remove it, or say "
            "where the annotations of these are with annotations=FOLDER or annotations=TABLE.csv"
        )
    return joined


def _stem(path: str) -> str:
    """A path without the ending of its file."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


def _synset(image: Path, annotation: cls_loc.Annotation | None) -> str:
    if annotation is None or not annotation.names:
        raise DataError(
            f"{image}: lies in no class folder and no annotation tells its class; "
            "sort the images into class folders, or put Annotations/CLS-LOC beside Data"
        )
    return annotation.names[0]


def _readable(class_ids: Sequence[str], mapping: Path | None) -> tuple[str, ...]:
    if mapping is None:
        return tuple(class_ids)
    names = {}
    for line in mapping.read_text("utf-8", errors="replace").splitlines():
        synset, _, synonyms = line.partition(" ")
        names[synset] = synonyms.split(",")[0].strip()
    readable = [names.get(name) or name for name in class_ids]
    # ImageNet has two cranes (the bird, the machine) and two maillots.
    return tuple(
        f"{name} ({class_id})" if readable.count(name) > 1 else name
        for name, class_id in zip(readable, class_ids, strict=True)
    )
