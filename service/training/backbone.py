"""The registered classifier that a detector begins with, kept in the run's folder.

So a run that is resumed needs no tracking server for it, and stands on the same weights though an alias has moved on.
"""

from dataclasses import dataclass
from pathlib import Path

from service import bundle, lineage, resolution
from service.bundle import Card
from service.config import DetectionConfig
from service.errors import CheckpointError
from service.models import Classifier
from service.resolution import Resolved
from service.run_folder import RunFolder
from service.training import distributed
from service.training.distributed import World


@dataclass(frozen=True)
class Backbone:
    """A classifier in a run's folder.

    Attributes:
        card: its card, with the weights' checksum.
        resolved: where it comes from, lineage included; its folder is the copy.
    """

    card: Card
    resolved: Resolved

    def classifier(self) -> Classifier:
        """The network with its weights, on the CPU; raises CheckpointError if they are damaged."""
        weights = bundle.read_weights(self.resolved.folder, self.card)
        return bundle.build(self.card, weights, self.resolved.uri)


def take(job: DetectionConfig, folder: RunFolder, world: World) -> Backbone:
    """The job's backbone: brought to the run's folder by the main worker, read from there by all.

    Raises:
        CheckpointError: there is no such model, alias or version (which there are); it is damaged or half written; the
            run in this folder began with another one.
        TrackingError: the tracking server does not answer, and the run has no copy yet.
    """
    place = folder.path / lineage.BACKBONE
    # Hundreds of megabytes over a slow line take longer than a collective operation waits.
    awaited = distributed.however_long(world, "the model that the detector begins with")
    distributed.on_main(world, lambda: _bring(job, folder, place), awaited)
    origin = lineage.read_origin(place)
    assert origin is not None, "the main worker has put it there"
    return Backbone(bundle.read_card(place), lineage.copied(place, origin))


def _bring(job: DetectionConfig, folder: RunFolder, place: Path) -> None:
    asked = job.model.backbone
    assert asked is not None, "the configuration was checked"
    # What lies there without a checkpoint is of a run that never got to one.
    kept = lineage.read_origin(place) if folder.is_taken() else None
    if kept is not None and kept["asked"] == asked:
        return
    resolved = resolution.resolve(asked, job.tracking.uri)
    card = bundle.read_card(resolved.folder)
    # Damage is found here, not by one worker after the other.
    weights = bundle.read_checked(resolved.folder / bundle.WEIGHTS, card.weights_sha256)
    if kept is not None:
        began_with = bundle.read_card(place).weights_sha256
        if began_with != card.weights_sha256:
            raise CheckpointError(
                f"{folder.path}: this run began with {kept['uri']} ({began_with[:12]}), and {asked} is "
                f"{resolved.uri} ({card.weights_sha256[:12]}) now; give that one, or choose name=OTHER"
            )
        return
    card_text = (resolved.folder / bundle.CARD).read_bytes()
    files = {bundle.CARD: card_text, bundle.WEIGHTS: weights, **lineage.origin_file(asked, resolved)}
    bundle.write_folder(place, files)
