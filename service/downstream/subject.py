"""Who is asked, and about what: a model from the registry, and images of the kind that it was trained on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import datasets
from pipelines.manifest import Manifest
from pipelines.plan import View
from service import registry
from service.bundle import Card
from service.errors import ConfigError, DataError
from service.models import Classifier
from service.registry import Resolved

_WORDNET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device.

    Attributes:
        card, resolved: what it is, and where it was found. view: how it sees images.
    """

    model: Classifier
    card: Card
    resolved: Resolved
    view: View
    device: torch.device

    @property
    def title(self) -> str:
        """For people: the registered name and version, or `name` alone."""
        return self.name if self.resolved.version is None else f"{self.name} {self.resolved.version}"

    @property
    def name(self) -> str:
        """The registered name; else the id of the run that made it; else the name of its folder."""
        return self.resolved.name or self.resolved.run_id or self.resolved.folder.resolve().name

    @property
    def slug(self) -> str:
        """For files: name and version."""
        return self.name if self.resolved.version is None else f"{self.name}-{self.resolved.version}"


def load(uri: str, tracking_uri: str | None = None, device: str = "auto") -> Subject:
    """The model behind an address.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.
        device: "auto", "cpu", "cuda" or "cuda:INDEX".

    Raises:
        ConfigError: no such device on this machine.
        CheckpointError: no such model, or a damaged one.
        TrackingError: the tracking server does not answer.
    """
    place = _place(device)
    model, card, resolved = registry.load(uri, tracking_uri=tracking_uri)
    return Subject(model.to(memory_format=torch.channels_last).to(place), card, resolved, view_of(card), place)


def view_of(card: Card) -> View:
    """How a model sees images."""
    return View(**card.view)


def _place(device: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    there = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if device not in there:
        raise ConfigError(f"device {device!r} does not exist on this machine; there are {', '.join(there)}")
    return torch.device(device)


def open_data(
    subject: Subject,
    data: str | None = None,
    root: Path | str | None = None,
    split: str | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """The images to ask a model about, as `open_images`."""
    return open_images(subject.card, subject.resolved.uri, data, root, split, data_options)


def open_images(
    card: Card,
    uri: str,
    data: str | None = None,
    root: Path | str | None = None,
    split: str | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """The images to ask about: what is not given is what the model was trained with and evaluated on.

    Args:
        card, uri: of the model; nobody need have loaded it.

    Raises:
        ConfigError: another data set and no word of where it lies, or a model that says nothing of data, as one that
            was imported without any, and neither does the caller.
        DataError: it is not there, or damaged.
    """
    name, part = data or card.data, split or card.split
    place = root or (card.root if name == card.data else "")
    if not (name and part) or (not card.data and not place):
        wanted = {"--data NAME": name, "--root FOLDER": place, "--split val": part}
        missing = " ".join(option for option, value in wanted.items() if not value)
        raise ConfigError(
            f"{uri} does not say which images it was evaluated on; say it with {missing} "
            "(in all: --data NAME --root FOLDER --split val)"
        )
    if not place:
        raise ConfigError(f"{uri} was trained on {card.data!r}; say where {name!r} lies with --root FOLDER")
    if data_options is None:
        data_options = card.data_options if name == card.data else {}
    return datasets.load(name, place, part, **data_options)


def check_classes(manifest: Manifest, classes: tuple[str, ...], model: str) -> None:
    """Raise DataError unless the data's labels are what the model means by its logits, by their names or their ids."""
    where = f"{manifest.name} {manifest.split} in {manifest.root}"
    if len(manifest.classes) != len(classes):
        raise DataError(
            f"{where}: has {len(manifest.classes)} classes, {model} knows {len(classes)}; use what it was trained on"
        )
    if manifest.class_ids == classes:
        return
    for label, (ours, its) in enumerate(zip(manifest.classes, classes, strict=True)):
        if ours != its:
            # The data's readable names are what the model may know, if only they were there.
            hint = ", or put LOC_synset_mapping.txt beside it" if _WORDNET.fullmatch(ours) else ""
            raise DataError(
                f"{where}: class {label} is {ours!r}, but {its!r} to {model}; use what it was trained on{hint}"
            )
