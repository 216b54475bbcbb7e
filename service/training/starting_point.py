"""What a run starts from: its own newest checkpoint, another model's weights, or nothing."""

import logging
from collections.abc import Mapping
from typing import Any

from pipelines.manifest import Manifest
from service import bundle, resolution
from service.config import JobConfig
from service.errors import CheckpointError
from service.models.heads import Classifier
from service.run_folder import RunFolder
from service.training import checkpoint, distributed
from service.training.distributed import World
from service.training.lengths import Lengths, sizes

_log = logging.getLogger(__name__)


def start_from(model: Classifier, uri: str, tracking_uri: str | None) -> None:
    """Give `model` the weights of another, as far as they fit; a head for other classes stays as it was drawn.

    Raises:
        CheckpointError: there is no such model, or its trunk is another network's.
    """
    folder = resolution.resolve(uri, tracking_uri).folder
    weights = bundle.read_weights(folder, bundle.read_card(folder))
    own = model.state_dict()
    heads = ("fc.", "pretext_fc.")
    fits = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    checkpoint.check_fit(
        folder,
        {name: value for name, value in weights.items() if not name.startswith(heads)},
        {name: tuple(value.shape) for name, value in own.items() if not name.startswith(heads)},
    )
    model.load_state_dict(fits, strict=False)
    _log.info("weights from %s; drawn anew: %s", uri, sorted(set(own) - set(fits)) or "nothing")


def facts_of(job: JobConfig, lengths: Lengths, train_set: Manifest, eval_set: Manifest) -> dict[str, Any]:
    """What a resumed run has to agree with, as JSON values: which sample comes when, what is drawn for it, and more.

    With another one of these it would go on in the middle of another order, and repeat samples or leave them out.
    """
    return {
        "seed": job.seed,
        "global_batch": job.global_batch,
        "data_digest": train_set.digest,
        "eval_digest": eval_set.digest,
        "samples_per_epoch": lengths.samples,
        "total_steps": lengths.total,
        "classes": list(train_set.classes),
        "optimizer": job.optimizer.name,
        "data.order": job.data.order,
        "data.block": job.data.block if job.data.order == "blocks" else None,
        "data.repeats": job.data.repeats,
        "data.train_limit": job.data.train_limit,
        # In steps: however it is written.
        "data.sizes": [list(part) for part in sizes(job, lengths.samples)],
        "data.augment": [part.model_dump(mode="json") for part in job.data.augment],
        "pretext": job.pretext.model_dump(mode="json"),
    }


def newest(
    folder: RunFolder, facts: Mapping[str, Any], model: Classifier, world: World
) -> checkpoint.Checkpoint | None:
    """The newest sound checkpoint, whose weights `model` then has; None if the run had not come to one.

    The main worker chooses, so that all of them go on from the same one. A fact that it does not hold was not yet
    written down by the version that wrote it, and is taken to be the same.

    Raises:
        CheckpointError: none is sound, it is another job's (what differs), or another network's (which layers).
    """
    chosen: list[str] = []

    def choose() -> None:
        found, problems = checkpoint.newest(folder.checkpoints)
        for problem in problems:
            _log.warning("passed over: %s", problem)
        if found is None and problems:
            raise CheckpointError(
                f"{folder.checkpoints}: no sound checkpoint:\n  " + "\n  ".join(problems) + "\n--restart begins anew"
            )
        chosen.append("" if found is None else found.path.name)

    distributed.on_main(world, choose)
    name = distributed.from_main(chosen[0] if chosen else "", world.device)
    if not name:
        return None
    found = checkpoint.read(folder.checkpoints / name)
    weights = found.tensors("weights")
    checkpoint.check_fit(found.path, weights, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    differing = [
        f"{name}: {found.facts[name]!r} then, {value!r} now"
        for name, value in facts.items()
        if name in found.facts and found.facts[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"{found.path}: the job has changed since, and would not be the same run:\n  "
            + "\n  ".join(differing)
            + "\nset it back, or choose name=OTHER"
        )
    model.load_state_dict(weights)
    return found
