"""A model's weakly supervised localization by one protocol, as an entry of the table. torch comes when it runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipelines.manifest import Manifest
from service import config_file, lineage, provenance
from service.comparison import published
from service.comparison.entrants import Entrant
from service.comparison.measurement import Images, Place
from service.config_fields import Section
from service.errors import ConfigError
from service.lineage import Earlier


class Settings(Section):
    """How models are asked where things are; keys of `--config wsol=FILE`, and of `wsol.KEY=VALUE`."""

    data: str | None = Field(None, description="data set with boxes; default: what a model was evaluated on")
    root: Path | str | None = Field(None, description="folder that holds it")
    split: str | None = Field(None, description="split; default: the one that a model was evaluated on")
    options: dict[str, Any] | None = Field(None, description="the data set's own options")
    protocols: tuple[str, ...] = Field(("paper", "official"), min_length=1, description="one table each")
    component: str | None = Field(None, description="pixels or contours; default: the protocol's")
    limit: int | None = Field(None, ge=1, description="only so many images, drawn by a fixed seed")
    batch_size: int = Field(64, ge=1, description="images of a forward pass; the numbers do not depend on it")
    device: str = Field("auto", description="auto, cpu or cuda")
    loader: str = Field("dali", description="dali, or torch")


def settings(path: Path | None, data: str | None, root: str | None, overrides: Sequence[str]) -> Settings:
    """The file's keys, then the options, then `KEY=VALUE`; raises ConfigError."""
    values = config_file.read(path) if path is not None else {}
    values |= {key: value for key, value in (("data", data), ("root", root)) if value is not None}
    for override in overrides:
        config_file.assign(values, override)
    try:
        found = Settings.model_validate(values)
    except ValidationError as error:
        known = ", ".join(Settings.model_fields)
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"{path or 'wsol'}: {problems}; its keys are {known}") from None
    from service.downstream.protocol import choose

    for protocol in found.protocols:
        choose(protocol, found.component)
    return found


@dataclass(frozen=True)
class Localization:
    """An entry: `place.variant` is the protocol.

    Attributes:
        about: all that the numbers follow from besides weights and images, as `wsol.settings` gives it.
        experiment: of MLflow, where a new result goes.
    """

    place: Place
    images: Images
    unlike_published: tuple[str, ...]
    about: Mapping[str, Any]
    settings: Settings
    tracking_uri: str | None
    experiment: str

    @property
    def work(self) -> str:
        """Images of the pass."""
        return f"{self.images.count:,} images"

    def find(self) -> Earlier | None:
        """As `Measurement.find`."""
        found = lineage.find_downstream(
            "wsol",
            self.place.entrant.card.weights_sha256,
            data_digest=self.images.digest,
            config_digest=provenance.digest(self.about),
            tracking_uri=self.tracking_uri,
        )
        return found[0] if found else None

    def expected_s(self) -> float | None:
        """By the rates of earlier passes over the same images."""
        alike = lineage.find_alike("wsol", data_digest=self.images.digest, tracking_uri=self.tracking_uri)
        rates = [one.metrics["images_per_s"] for one in alike if one.metrics.get("images_per_s", 0) > 0]
        return self.images.count / statistics.median(rates) if rates else None

    def run(self, say: Callable[[str], object]) -> tuple[str, Mapping[str, float]]:
        """As `Measurement.run`."""
        from service.downstream import wsol

        given = self.settings
        result = wsol.run(
            self.place.entrant.resolved.uri,
            data=given.data,
            root=given.root,
            split=given.split,
            data_options=given.options,
            protocol=self.place.variant,
            component=given.component,
            limit=given.limit,
            batch_size=given.batch_size,
            device=given.device,
            loader=given.loader,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
        )
        if result.notice:
            say(result.notice)
        return result.record_id, result.metrics()


def prepare(
    entrant: Entrant, protocol: str, given: Settings, tracking_uri: str | None, experiment: str
) -> Localization:
    """Look at the images, without loading the model.

    Raises:
        ConfigError: no word of where the images lie.
        DataError: they are not there, have no boxes, or other classes than the model.
    """
    from service.downstream import localization, subject, wsol
    from service.downstream.protocol import choose

    uri, card = entrant.resolved.uri, entrant.card
    manifest = subject.open_images(card, uri, given.data, given.root, given.split, given.options)
    localization.check(manifest, card.classes, uri)
    about = wsol.settings(manifest, subject.view_of(card), choose(protocol, given.component), given.limit)
    count = min(len(manifest), given.limit or len(manifest))
    return Localization(
        Place("wsol", entrant, protocol),
        Images(manifest.name, manifest.split, manifest.digest, count),
        _unlike(entrant, manifest, given),
        about,
        given,
        tracking_uri,
        experiment,
    )


def _unlike(entrant: Entrant, manifest: Manifest, given: Settings) -> tuple[str, ...]:
    found = published.differences(entrant.card) + published.other_images(manifest)
    return (*found, f"of {given.limit:,} images only") if given.limit is not None else found
