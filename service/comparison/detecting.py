"""A detector trained on a model with one seed, as an entry of the table: `lorot detect` and `lorot segment`."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from service import detection_config, lineage, provenance, splits, transfer
from service.comparison import published
from service.comparison.entrants import Entrant
from service.comparison.measurement import Images, Place
from service.errors import ConfigError
from service.lineage import Earlier
from service.naming import flatten
from service.run_folder import RunFolder
from service.training.lengths import Lengths
from service.transfer import Transfer

# Of two runs with these in common the one takes about as long as the other, on the same data.
_ALIKE = ("duration", "global_batch", "micro_batch", "data.short_sides", "data.long_side", "model.name")


@dataclass(frozen=True)
class Settings:
    """What is asked for of a detector's job, besides model and seed.

    Attributes:
        path: its configuration; None: the one that reproduces table 10.
        data, root: of its data; None: as the configuration says.
        overrides: `key.sub=value`.
    """

    path: Path | None = None
    data: str | None = None
    root: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detector:
    """An entry: `place.variant` is the seed.

    Attributes:
        transfer: the job; its name holds a digest, so that a run that was interrupted is found by its folder.
        num_steps: it trains for.
    """

    place: Place
    images: Images
    unlike_published: tuple[str, ...]
    transfer: Transfer
    num_steps: int

    @property
    def work(self) -> str:
        """Steps of the training, and images it is measured on."""
        job = self.transfer.job
        return f"{self.num_steps:,} steps of {job.global_batch} images, {self.images.count:,} to evaluate"

    def find(self) -> Earlier | None:
        """As `Measurement.find`."""
        found = lineage.find_downstream(
            self.place.job,
            self.transfer.card.weights_sha256,
            data_digest=self.images.digest,
            config_digest=self.transfer.job.digest,
            tracking_uri=self.transfer.job.tracking.uri,
        )
        return found[0] if found else None

    def expected_s(self) -> float | None:
        """By how long runs of the same length on the same data took, of any model and seed."""
        job = self.transfer.job
        uri = job.tracking.uri
        ours = flatten(job.model_dump(mode="json"))
        alike = lineage.find_alike(self.place.job, data_digest=self.images.digest, tracking_uri=uri)
        took = [
            (one.ended_ms - one.began_ms) / 1000
            for one in alike
            if one.ended_ms is not None
            and one.began_ms is not None
            and all(one.params.get(key) == ours.get(key) for key in _ALIKE)
        ]
        return statistics.median(took) if took else None

    def run(self, say: Callable[[str], object]) -> tuple[str, Mapping[str, float]]:
        """As `Measurement.run`; a run that was begun is gone on with."""
        folder = RunFolder(self.transfer.job.folder)
        result = transfer.run(self.transfer, resume=folder.is_taken(), say=say)
        return str(result["record_id"]), dict(result["scores"])


def prepare(job: str, entrant: Entrant, seed: int | None, given: Settings, tracking_uri: str | None) -> Detector:
    """Look at the configuration, the model and the data.

    Args:
        seed: of the detector's training; None: the configuration's.

    Raises:
        ConfigError: the configuration is wrong, too short for its schedule, or names run or model, which is done here.
        DataError: the data are not there or damaged.
        CheckpointError: the model is damaged.
    """
    for override in given.overrides:
        if override.partition("=")[0] in ("name", "model.backbone", "job", *(("seed",) if seed is not None else ())):
            raise ConfigError(f"override {override}: `lorot compare` says that itself, for each model and seed")
    own = [f"seed={seed}"] if seed is not None else []
    found = transfer.prepare(
        *(job, entrant.resolved.uri),
        path=given.path,
        data=given.data,
        root=given.root,
        overrides=[*given.overrides, *own],
        tracking_uri=tracking_uri,
    )
    train_set, eval_set = splits.load(found.job)
    digest = lineage.split_digest(train_set.digest, eval_set.digest)
    parts = {"settings": found.job.digest, "data": digest, "weights": found.card.weights_sha256}
    name = f"{job}-{entrant.slug}-seed{found.job.seed}-{provenance.digest(parts)[:8]}"
    found = dataclasses.replace(
        found,
        overrides=(*found.overrides, f"name={json.dumps(name)}"),
        job=found.job.model_copy(update={"name": name}),
    )
    available = train_set.heading.num_trainable
    lengths = Lengths.of(found.job, len(train_set) if available is None else available)
    # As the job would say it, but before hours of others.
    detection_config.check_schedule(found.job, lengths.total, lengths.samples)
    return Detector(
        Place(job, entrant, str(found.job.seed)),
        Images(eval_set.name, eval_set.split, digest, len(eval_set)),
        (
            *published.differences(entrant.card),
            *published.other_objects(train_set, eval_set),
            *published.other_recipe(found.job),
        ),
        found,
        lengths.total,
    )
