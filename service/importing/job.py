"""`lorot import`: published weights become a registered model, which every downstream job takes like one of ours."""

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipelines import datasets
from pipelines.plan import View
from service import bundle, provenance, recovery, registration, registry, tracking
from service.bundle import Card
from service.config import TrackingConfig
from service.errors import CheckpointError, ConfigError, LorotError, StorageError, TrackingError
from service.importing import checkpoint_file, imagenet, recognition
from service.importing.checkpoint_file import Foreign
from service.spool import Spool

_CLASSES_BYTES = 16 << 20
# Short side 256, centre 224: how the papers evaluate.
_IMAGENET_VIEW = View(size=224)


@dataclass(frozen=True)
class Wish:
    """What the file does not say.

    Attributes:
        network: its name; None: the one that fits.
        classes: "imagenet", a file (a JSON list, or a line a name), or names with commas between; None: ImageNet's for
            1000 outputs.
        data, root, split, data_options: of a data set, if it is to be evaluated on one: the classes are then its own.
        pretext: the task its pretext head was trained for; None: by the number of outputs; "none" leaves the head out.
        view: how an image becomes its input.
        origin: where the file is from, as an address or a sentence.
        entry: of the file, that holds the weights; None: the usual ones.
    """

    network: str | None = None
    classes: str | None = None
    data: str | None = None
    root: Path | None = None
    split: str = "val"
    data_options: Mapping[str, Any] | None = None
    pretext: str | None = None
    view: View = _IMAGENET_VIEW
    origin: str = ""
    entry: str | None = None


@dataclass(frozen=True)
class Imported:
    """The registered version, its card, the run that records the import, and what was changed on the way."""

    name: str
    version: int
    run_id: str
    card: Card
    notes: tuple[str, ...]


def run(path: Path, name: str, wish: Wish, *, tracking_uri: str | None = None, experiment: str = "lorot") -> Imported:
    """Register the weights of a file as the newest version of `name`.

    The file's name, SHA-256 and origin are in the card, and tags of the run and of the version.

    Raises:
        CheckpointError: the file is no weights, wants more than tensors, or fits no network (which layers).
        ConfigError: a name MLflow does not take; classes, pretext task or network that do not go with the file.
        DataError: the data set cannot be read.
        TrackingError: the tracking server does not answer. If it went away in the middle, the record of the import
            waits in runs/import-NAME-..., for `lorot sync`.
        StorageError: there is no room.
    """
    registration.check_name(name)
    foreign = checkpoint_file.read(path, wish.entry)
    card, weights, notes = prepare(foreign, path, wish)
    folder = _folder(name)
    try:
        version, card, run_id, notice = _registered(folder, name, weights, card, tracking_uri, experiment)
    finally:
        shutil.rmtree(folder / "model", ignore_errors=True)
        # What the server has not got is kept, for `lorot sync`.
        if not _waits(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
    return Imported(name, version, run_id, card, (*notes, notice) if notice else notes)


def _folder(name: str) -> Path:
    """A new folder among those of the runs; raises StorageError."""
    runs = Path("runs")
    try:
        runs.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"import-{name}-", dir=runs))
    except OSError as error:
        raise StorageError(
            f"{runs}: no folder can be made there ({error.strerror}); import from a folder that can be written"
        ) from None


def _waits(folder: Path) -> bool:
    """Whether records lie in `folder` that were not sent."""
    if not (folder / recovery.SPOOL).exists():
        return False
    try:
        spool = Spool(folder / recovery.SPOOL)
    except LorotError:  # still being sent
        return True
    try:
        return not spool.empty()
    finally:
        spool.close()


def _registered(
    folder: Path, name: str, weights: Mapping[str, torch.Tensor], card: Card, uri: str | None, experiment: str
) -> tuple[int, Card, str, str]:
    """The version, its card, the run's id, and what the server has not got of the run's record, as a sentence."""
    config = TrackingConfig(uri=uri, experiment=experiment, system_metrics=False)
    tags = {"job": "import"} | {f"origin.{key}": value for key, value in card.origin.items()}
    record = tracking.open_run(config, name=f"import-{name}", folder=folder, tags=tags)
    status, notice = "FAILED", ""
    try:
        record.log_params({"model": card.model, "view": card.view, "classes": card.num_classes})
        card = bundle.write_bundle(folder / "model", weights, replace(card, run_id=record.run_id))
        version = registry.register(
            folder / "model", name=name, run_id=record.run_id, metric="val/top1", tracking_uri=uri
        )
        status = "FINISHED"
    except LorotError as error:
        if not (notice := record.finish(status)):
            raise
        raise TrackingError(f"nothing is known to be registered: {error}\n{notice}") from error
    finally:
        notice = record.finish(status) or notice
    return version, card, record.run_id, notice


def prepare(foreign: Foreign, path: Path, wish: Wish) -> tuple[Card, dict[str, torch.Tensor], tuple[str, ...]]:
    """The card and the weights of a file, checked to be a network that answers; and notes for the user.

    Raises:
        CheckpointError, ConfigError, DataError: as `run`.
    """
    source = str(path)
    known = recognition.recognise(foreign.tensors, source, wish.network)
    weights, notes = dict(known.weights), list(known.notes)
    task, options = recognition.pretext_of(known.num_pretext, wish.pretext, source)
    num_pretext = known.num_pretext if task != "none" else 0
    if num_pretext < known.num_pretext:
        weights = {name: value for name, value in weights.items() if not name.startswith("pretext_fc.")}
        notes.append("the pretext head is left out")
    elif num_pretext == 4 and wish.pretext is None:
        notes.append("a pretext head of 4 outputs is taken for lorot_i's; --pretext rotation says otherwise")
    if foreign.others:
        notes.append(f"used is {foreign.entry!r}; not used: {', '.join(foreign.others[:8])}")
    card = Card(
        model=known.model.model_dump(mode="json"),
        classes=_classes(wish, known.num_classes, source),
        view=bundle.evaluation_view(wish.view),
        data=wish.data or "",
        data_options=dict(wish.data_options or {}),
        root=str(wish.root.resolve()) if wish.root is not None else "",
        split=wish.split if wish.data else "",
        pretext=task,
        pretext_options=options,
        num_pretext=num_pretext,
        objective="imported",
        run_name=f"import of {path.name}",
        versions=provenance.package_versions() | provenance.code_version(),
        origin={
            "file": path.name,
            "sha256": foreign.sha256,
            "bytes": str(foreign.bytes),
            "entry": foreign.entry,
            "from": wish.origin or path.name,
        },
    )
    _check_answers(card, weights, source)
    return card, weights, tuple(notes)


@torch.inference_mode()
def _check_answers(card: Card, weights: dict[str, torch.Tensor], source: str) -> None:
    size = int(card.view["size"])
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    if not bool(torch.isfinite(bundle.build(card, weights, source)(noise).logits).all()):
        raise CheckpointError(f"{source}: the logits of an image of noise are not finite; the weights are damaged")


def _classes(wish: Wish, num_classes: int, source: str) -> tuple[str, ...]:
    if wish.data is not None:
        if wish.root is None:
            raise ConfigError(f"--data {wish.data}: say where it lies with --root FOLDER")
        if wish.classes is not None:
            raise ConfigError("--classes and --data: the data set has classes of its own; leave one of the two out")
        manifest = datasets.load(wish.data, wish.root, wish.split, **dict(wish.data_options or {}))
        names, where = tuple(manifest.classes), f"{wish.data} {wish.split} in {wish.root}"
    else:
        names, where = _named(wish.classes, num_classes, source)
    if len(names) != num_classes:
        raise ConfigError(
            f"{source}: has {num_classes} outputs, and {where} {len(names)} classes; give the same number"
        )
    blank = [index for index, name in enumerate(names) if not name.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1][:5]
    if blank or twice:
        problem = f"class {blank[0]} has no name" if blank else f"{', '.join(twice)} stand there more than once"
        raise ConfigError(f"{where}: {problem}; every class needs a name of its own")
    return names


def _named(classes: str | None, num_classes: int, source: str) -> tuple[tuple[str, ...], str]:
    if classes == "imagenet" or (classes is None and num_classes == len(imagenet.CLASSES)):
        return imagenet.CLASSES, "ImageNet"
    if classes is None:
        raise ConfigError(
            f"{source}: has {num_classes} outputs, and nothing says what they mean; name them with --classes FILE, "
            "--classes cat,dog,..., or --data NAME --root FOLDER"
        )
    path = Path(classes)
    if "," in classes and not path.exists():
        return tuple(name.strip() for name in classes.split(",")), "--classes"
    try:
        if path.stat().st_size > _CLASSES_BYTES:
            raise ConfigError(f"--classes {classes}: larger than {_CLASSES_BYTES:,} bytes, which is no list of names")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--classes {classes}: no such file of names ({error}); write imagenet, a file, or cat,dog,..."
        ) from None
    if text.lstrip()[:1] != "[":
        return tuple(line.strip() for line in text.strip().splitlines()), classes
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--classes {classes}: no JSON list ({error})") from None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f'--classes {classes}: a list of texts is wanted, as ["cat", "dog"]')
    return tuple(listed), classes


def show(imported: Imported, console: Console) -> None:
    """Print what was registered, what was changed on the way, and how to go on."""
    card, uri = imported.card, f"models:/{imported.name}/{imported.version}"
    head = f"pretext {card.pretext}, {card.num_pretext} outputs" if card.num_pretext else "no pretext head"
    view = card.view
    lines: Sequence[str] = (
        f"registered as {uri}, which is models:/{imported.name}@latest",
        f"{card.model['name']}, {card.num_classes} classes ({_ends(card.classes)}), {head}",
        f"evaluated at {view['size']} pixels: crop {view['crop']}, mean {list(view['mean'])}, std {list(view['std'])}",
        f"file {card.origin['file']}, SHA-256 {card.origin['sha256']}, from {card.origin['from']}",
        *(f"note: {note}" for note in imported.notes),
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    # Without --data, no split is known either.
    data = "" if card.data else " --data folder --root FOLDER --split val"
    console.print(f"next: lorot wsol --model {uri}{data}", markup=False, highlight=False, soft_wrap=True)


def _ends(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
