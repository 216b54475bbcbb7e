"""What a classifier's training amounts to: its network, and the memory and storage that it takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines import pretext
from service.check.findings import FLOAT, STATES, Findings, completed, memory, outline
from service.config import JobConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from service.models import Classifier

# Assumed of data that is not there, so that the network can still be counted.
_CLASSES_UNKNOWN = 1000


def examine(job: JobConfig, workers: int | None = None) -> Findings[JobConfig]:
    """Work out what `job` would do on `workers` processes of this machine; raises ConfigError as training would."""
    known = outline(job, workers)
    classes = known.splits[0].classes if known.splits else _CLASSES_UNKNOWN
    model = network(job.model, classes, num_pretext_labels(job))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("pretext_fc"))
    states = 1 + STATES[job.optimizer.name] + (job.ema is not None)
    checkpoint = parameters * FLOAT * states
    return completed(
        known,
        # The newest ones, the best, the one being written, the model's own file and its copy in the registry.
        checkpoint * (job.checkpoint.keep_last + 2) + 2 * parameters * FLOAT,
        estimate_memory(job, model, known.workers),
        classes=classes,
        parameters=parameters,
        pretext_parameters=heads,
        trained_parameters=parameters,
        checkpoint_bytes=checkpoint,
    )


def num_pretext_labels(job: JobConfig) -> int:
    """Outputs of the pretext head: 0 if the objective has no pretext loss."""
    from service.training import objectives

    if not objectives.learns_pretext(job.objective.name):
        return 0
    return pretext.load(job.pretext.name, **job.pretext.options).num_labels


def network(model: ModelConfig, classes: int, pretext_labels: int) -> "Classifier":
    """The network without memory for its weights (on torch's meta device)."""
    import torch

    from service import models

    with torch.device("meta"):
        return models.build(model, classes, pretext_labels)


def activation_bytes(model: "Classifier", size: int, samples: int = 2) -> int:
    """Bytes in fp32 that one training sample of (3, size, size) keeps for the backward pass, counted without data."""
    import torch

    images = torch.empty(samples, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    return kept_bytes(model, lambda: model.train()(images)) // samples


def kept_bytes(model: "nn.Module", forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, besides the weights."""
    import torch

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Holding the storage keeps its address from being given to the next one.
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def estimate_memory(job: JobConfig, model: "Classifier", workers: int) -> dict[str, int]:
    """Bytes a worker needs, by what for: as `findings.memory`."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * FLOAT
    forwarded = job.micro_batch * {"all": 4, "one": 2}[job.objective.turns] ** (job.objective.name == "parallel_task")
    # What the largest steps need; evaluation keeps no activations.
    size = max([job.data.size, *(part.size for part in job.data.sizes)])
    batch = job.micro_batch * 3 * max(size, job.data.eval_size or 0) ** 2 * FLOAT
    activations = activation_bytes(model, size) * forwarded
    return memory(job, workers, weights=weights, trained=weights, activations=activations, batch=batch)
