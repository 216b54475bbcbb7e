"""What a run starts from: its own newest checkpoint, another model's weights, or nothing."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipelines.manifest import Manifest
from service import bundle, resolution
from service.config import JobConfig, TrainingConfig
from service.errors import CheckpointError
from service.run_folder import RunFolder
from service.training import checkpoint, distributed
from service.training.distributed import World
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.lengths import Lengths, sizes

_log = logging.getLogger(__name__)


def start_from(model: nn.Module, uri: str, tracking_uri: str | None) -> str:
    """Give `model` the weights of another, as far as names and shapes fit; returns what did, and what did not.

    Args:
        uri: of a registered model or a bundle, as `resolution.resolve` takes it; or the folder of a run, of its
            checkpoints, or of one of them: then the average counts if there is one, as it does when a run registers.

    Raises:
        CheckpointError: there is no such model, it is damaged, or nothing of its trunk fits.
    """
    weights = _weights_of(uri, tracking_uri)
    own = model.state_dict()
    heads = ("fc.", "pretext_fc.")
    fits = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    if not any(value.ndim > 1 and not name.startswith(heads) for name, value in fits.items()):
        # Raises: besides counters and heads there is nothing that the two have in common.
        checkpoint.check_fit(uri, weights, {name: tuple(value.shape) for name, value in own.items()})
    model.load_state_dict(fits, strict=False)
    told = f"{len(fits)} of {len(own)} tensors from {uri}"
    for what, names in (("drawn anew", set(own) - set(fits)), ("not taken over", set(weights) - set(fits))):
        if names:
            told += f"; {what}: {_shown(sorted(names))}"
    _log.info("%s", told)
    return told


def _shown(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _weights_of(uri: str, tracking_uri: str | None) -> dict[str, Tensor]:
    path = Path(uri)
    if not (path / bundle.CARD).exists() and path.is_dir():
        if (path / checkpoint.INDEX).exists():
            return _evaluated(checkpoint.read(path))
        for folder in (path, RunFolder(path).checkpoints):
            if checkpoint.find(folder):
                found, problems = checkpoint.newest(folder)
                if found is None:
                    raise CheckpointError(f"{folder}: no sound checkpoint:\n  " + "\n  ".join(problems))
                return _evaluated(found)
    folder = resolution.resolve(uri, tracking_uri).folder
    return bundle.read_weights(folder, bundle.read_card(folder))


def _evaluated(found: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """The weights that evaluations of this run used."""
    found.verify()
    if found.holds("ema"):
        return Ema.weights_in(found.tensors("ema"))
    return found.tensors("weights")


def restore(found: checkpoint.Checkpoint, engine: Engine, ema: Ema | None) -> None:
    """Give a live engine, and the average, the state of a checkpoint: at a start, or in the middle of a run.

    Every worker calls it, between two optimizer steps. Any ZeRO stage and number of workers takes any other's.

    Raises:
        CheckpointError: it is another network's or optimizer's, or holds no average though the job has one.
    """
    engine.load_weights(found.tensors("weights"))
    engine.load_optimizer_state(found.tensors("optimizer"))
    engine.load_scale_state(found.facts.get("scale", {}))
    if ema is None:
        return
    if not found.holds("ema"):
        raise CheckpointError(f"{found.path}: was written without an average; set ema=null, or choose name=OTHER")
    ema.load_state_dict(found.tensors("ema"))


def shared_facts(job: TrainingConfig, lengths: Lengths, train_set: Manifest, eval_set: Manifest) -> dict[str, Any]:
    """What any resumed run has to agree with, as JSON values: which sample comes when, what is drawn for it, and more.

    With another one of these it would go on in the middle of another order, and repeat samples or leave them out.
    """
    return {
        "seed": job.seed,
        "global_batch": job.global_batch,
        # BatchNorm's groups: an order's cut into them is part of what the network computes.
        "micro_batch": job.micro_batch,
        "data_digest": train_set.digest,
        "eval_digest": eval_set.digest,
        "samples_per_epoch": lengths.samples,
        "total_steps": lengths.total,
        "classes": list(train_set.classes),
        "optimizer": job.optimizer.name,
        "data.train_limit": job.data.train_limit,
    }


def facts_of(job: JobConfig, lengths: Lengths, train_set: Manifest, eval_set: Manifest) -> dict[str, Any]:
    """What a resumed run of a classifier has to agree with."""
    return shared_facts(job, lengths, train_set, eval_set) | {
        "data.order": job.data.order,
        "data.block": job.data.block if job.data.order == "blocks" else None,
        "data.repeats": job.data.repeats,
        # In steps: however it is written.
        "data.sizes": [list(part) for part in sizes(job, lengths.samples)],
        "data.augment": [part.model_dump(mode="json") for part in job.data.augment],
        "pretext": job.pretext.model_dump(mode="json"),
    }


def choose(folder: RunFolder, world: World) -> checkpoint.Checkpoint | None:
    """The newest sound checkpoint of the run; None if it had not come to one. Nothing is being written meanwhile.

    The main worker chooses, so that all of them go on from the same one.

    Raises:
        CheckpointError: there are some, and none is sound.
    """
    chosen: list[str] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            checkpoint.tidy(folder.checkpoints)
        found, problems = checkpoint.newest(folder.checkpoints)
        for problem in problems:
            _log.warning("passed over: %s", problem)
        if found is None and problems:
            raise CheckpointError(
                f"{folder.checkpoints}: no sound checkpoint:\n  " + "\n  ".join(problems) + "\n--restart begins anew"
            )
        chosen.append("" if found is None else found.path.name)

    distributed.on_main(world, look)
    name = distributed.from_main(chosen[0] if chosen else "", world.device)
    return checkpoint.read(folder.checkpoints / name) if name else None


def newest(folder: RunFolder, facts: Mapping[str, Any], model: nn.Module, world: World) -> checkpoint.Checkpoint | None:
    """What `choose` finds, if this job may go on from it; `restore` then does so.

    A fact that it does not hold was not yet written down by the version that wrote it, and is taken to be the same:
    the main worker's log says which.

    Args:
        model: as it was built, before an engine has it; not changed.

    Raises:
        CheckpointError: none is sound, it is another job's (what differs), or another network's (which layers).
    """
    found = choose(folder, world)
    if found is None:
        return None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint.check_fit(found.path, found.tensors("weights"), shapes)
    differing = [
        f"{name}: {found.facts[name]!r} then, {value!r} now"
        for name, value in facts.items()
        if name in found.facts and found.facts[name] != value
    ]
    if world.is_main and (unknown := sorted(facts.keys() - found.facts.keys())):
        _log.warning("%s: not known of this checkpoint, taken to be as now: %s", found.path, ", ".join(unknown))
    if differing:
        raise CheckpointError(
            f"{found.path}: the job has changed since, and would not be the same run:\n  "
            + "\n  ".join(differing)
            + "\nset it back, or choose name=OTHER"
        )
    return found
