"""Who is asked, and about what: a model from the registry, and images of the kind that it was trained on."""

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
        """For people: the registered name and version, or the name of its folder."""
        return self.name if self.resolved.version is None else f"{self.name} {self.resolved.version}"

    @property
    def name(self) -> str:
        """The registered name, or the name of its folder."""
        return self.resolved.name or self.resolved.folder.resolve().name

    @property
    def slug(self) -> str:
        """For files: name and version."""
        return self.name if self.resolved.version is None else f"{self.name}-{self.resolved.version}"


def load(uri: str, tracking_uri: str | None = None, device: str = "auto") -> Subject:
    """The model behind an address.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.
        device: "auto", "cpu", "cuda".

    Raises:
        CheckpointError: no such model, or a damaged one.
        TrackingError: the tracking server does not answer.
    """
    model, card, resolved = registry.load(uri, tracking_uri=tracking_uri)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return Subject(model.to(memory_format=torch.channels_last).to(place), card, resolved, View(**card.view), place)


def open_data(
    subject: Subject,
    data: str | None = None,
    root: Path | str | None = None,
    split: str | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """The images to ask about: what is not given is what the model was trained with and evaluated on.

    Raises:
        ConfigError: another data set, and no word of where it lies.
        DataError: it is not there, or damaged.
    """
    card = subject.card
    if data_options is None:
        data_options = card.data_options if data in (None, card.data) else {}
    if data not in (None, card.data) and root is None:
        raise ConfigError(
            f"{subject.resolved.uri} was trained on {card.data!r}; say where {data!r} lies with --root FOLDER"
        )
    return datasets.load(data or card.data, root or card.root, split or card.split, **data_options)


def check_classes(manifest: Manifest, classes: tuple[str, ...], model: str) -> None:
    """Raise DataError unless the data's labels are what the model means by its logits."""
    where = f"{manifest.name} {manifest.split} in {manifest.root}"
    if len(manifest.classes) != len(classes):
        raise DataError(
            f"{where}: has {len(manifest.classes)} classes, {model} knows {len(classes)}; use what it was trained on"
        )
    for label, (ours, its) in enumerate(zip(manifest.classes, classes, strict=True)):
        if ours != its:
            raise DataError(f"{where}: class {label} is {ours!r}, but {its!r} to {model}; use what it was trained on")
