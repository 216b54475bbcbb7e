"""A trained model as two files: `model.safetensors`, the weights, and `model.json`, the card that says what they are.

A third one, `MLmodel`, is for MLflow's own tools; nothing here reads it, and older models have none.

Nothing here unpickles. A card is data from outside: every value is checked before anything is built from it, and the
weights have to match the card's checksum and the network it describes, name by name and shape by shape.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

from pipelines.plan import View
from service import scratch_folder
from service.config import ModelConfig
from service.errors import CheckpointError, LorotError, StorageError
from service.flavour import MLMODEL, mlmodel

if TYPE_CHECKING:
    from torch import Tensor

    from service.models import Classifier

CARD = "model.json"
WEIGHTS = "model.safetensors"
# ImageNet-21k's card has about 1 MB.
_CARD_BYTES = 16 << 20
_LARGEST_SIDE = 8192

Text = Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True)
class Card:
    """What one has to know to use the weights, and where they come from.

    Attributes:
        model: the `model` block of the configuration.
        classes: class names, in the order of the logits.
        view: how an image becomes the network's input when it is evaluated, as `evaluation_view` gives it.
        training_view: what training did besides: its own size, sizes before that, augmentations, repeats.
        data: name of the data set it was trained on.
        data_digest: of the training split's manifest.
        data_options: the data set's options.
        root, split: where the data lay, and the split it was evaluated on.
        pretext, pretext_options: the pretext task.
        num_pretext: outputs of the pretext head, 0 without one.
        objective: what was minimised.
        metrics: final values by their names; accuracies are fractions. Values that are not finite are not written.
        chosen_by: the metric that `best` follows.
        run_id, run_name: the MLflow run that made it.
        versions: of the code and its packages.
        origin: of weights that were trained elsewhere: the file, its SHA-256, where it is from.
        weights_sha256: of `model.safetensors`, 64 hex digits; set by `write_bundle`.
        format: of these files.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    model: dict[Text, Any]
    classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1_000_000)]
    view: dict[Text, Any]
    training_view: dict[Text, Any] = field(default_factory=dict)
    data: Text = ""
    data_digest: Text = ""
    data_options: dict[Text, Any] = field(default_factory=dict)
    root: Text = ""
    split: Text = ""
    pretext: Text = "none"
    pretext_options: dict[Text, Any] = field(default_factory=dict)
    num_pretext: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    objective: Text = "supervised"
    metrics: dict[Text, float] = field(default_factory=dict)
    chosen_by: Text = ""
    run_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{0,256}$")] = ""
    run_name: Text = ""
    versions: dict[Text, Text] = field(default_factory=dict)
    origin: dict[Text, Text] = field(default_factory=dict)
    weights_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    format: Literal[1] = 1

    @property
    def num_classes(self) -> int:
        """Outputs of `fc`."""
        return len(self.classes)


_CARD_TYPE = TypeAdapter(Card)
# Of a View, what only training needs: it is no part of a card's `view`.
_TRAINING_ONLY = frozenset({"eval_size", "augment"})
_VIEW_FIELDS: dict[str, Any] = {
    part.name: (part.type, ...) for part in dataclasses.fields(View) if part.name not in _TRAINING_ONLY
}
_VIEW_TYPE = create_model("View", __config__=ConfigDict(extra="forbid", strict=True), **_VIEW_FIELDS)


def evaluation_view(view: View) -> dict[str, Any]:
    """What a card keeps of a view: the keywords of one that evaluates as it does, at its evaluation's size."""
    values = {name: getattr(view, name) for name in _VIEW_FIELDS}
    return {**values, "size": view.eval_size or view.size}


def write_bundle(folder: Path, state_dict: Mapping[str, "Tensor"], card: Card) -> Card:
    """Write `folder` whole, or leave what was there; returns the card with the weights' checksum.

    Args:
        state_dict: on any device, in any memory format, views of larger buffers included. Not changed.

    Raises:
        CheckpointError: the card would not be accepted when it is read.
        StorageError: the disk is full or cannot be written.
    """
    from safetensors.torch import save

    # Clones, because safetensors refuses tensors that share memory, as ZeRO's views do.
    weights = save({key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()})
    card = dataclasses.replace(
        card,
        metrics={key: float(value) for key, value in card.metrics.items() if math.isfinite(value)},
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = json.dumps(dataclasses.asdict(card), indent=1, ensure_ascii=False, allow_nan=False).encode()
    parse_card(text, str(folder / CARD))
    write_folder(folder, {WEIGHTS: weights, CARD: text, MLMODEL: mlmodel(card.weights_sha256, card.run_id)})
    return card


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files whole, in place of what was there, or leave that; raises StorageError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder.made(folder.parent, f".{folder.name}-") as beside:
            new, old = beside / "new", beside / "old"
            try:
                new.mkdir()
                for name, content in files.items():
                    _write(new / name, content)
                # A folder cannot replace one that has content: for a moment there is none.
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            finally:
                if old.exists() and not folder.exists():
                    old.rename(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the model ({error.strerror}); free some space and resume") from None


def read_card(folder: Path) -> Card:
    """The checked card of a bundle; raises CheckpointError with everything that is wrong with it."""
    path = folder / CARD
    try:
        size = path.stat().st_size
        if size > _CARD_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is no model card; the largest accepted has {_CARD_BYTES}")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no model here ({CARD}: {error.strerror}); a model is a folder with {CARD} and {WEIGHTS}"
        ) from None
    return parse_card(text, str(path))


def parse_card(text: bytes, source: str) -> Card:
    """Check a card's JSON; raises CheckpointError that names `source` and every wrong value."""
    try:
        card = _CARD_TYPE.validate_json(text)
        # JSON once more, because strict checking takes lists for tuples only there.
        model = ModelConfig.model_validate_json(json.dumps(card.model), strict=True)
        values = _VIEW_TYPE.model_validate_json(json.dumps(card.view), strict=True).model_dump()
        view = View(**values)
    except LorotError as error:
        raise CheckpointError(f"{source}: no preprocessing that this version knows: {error}") from None
    except ValidationError as error:
        within = ("view",) if error.title == _VIEW_TYPE.__name__ else ()
        problems = [
            f"{'.'.join(map(str, within + problem['loc']))}: {problem['msg']}" for problem in error.errors()[:10]
        ]
        raise CheckpointError(f"{source}: not a model card this version reads:\n  " + "\n  ".join(problems)) from None
    problems = []
    if not 1 <= view.size <= _LARGEST_SIDE:
        problems.append(f"view.size: {view.size} is not within 1 and {_LARGEST_SIDE}")
    if not 0 <= view.padding <= _LARGEST_SIDE:
        problems.append(f"view.padding: {view.padding} is not within 0 and {_LARGEST_SIDE}")
    if not 0 < view.eval_crop <= 1:
        problems.append(f"view.eval_crop: {view.eval_crop} is not above 0 and at most 1")
    if not all(math.isfinite(value) for value in view.mean):
        problems.append(f"view.mean: {view.mean} is not finite")
    if not all(0 < value < math.inf for value in view.std):
        problems.append(f"view.std: {view.std} is not above 0 and finite")
    if problems:
        raise CheckpointError(f"{source}: no preprocessing that this version knows:\n  " + "\n  ".join(problems))
    # A card that travels must not make its reader fetch other files.
    return dataclasses.replace(card, view=values, model={**model.model_dump(mode="json"), "init_from": None})


def read_weights(folder: Path, card: Card) -> dict[str, "Tensor"]:
    """The tensors of a bundle, on the CPU; raises CheckpointError if they are not the ones the card was written for."""
    return read_tensors(folder / WEIGHTS, card.weights_sha256)


def read_tensors(path: Path, sha256: str) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file, on the CPU; raises CheckpointError if it is not the one with this SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_checked(path, sha256)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def read_checked(path: Path, sha256: str) -> bytes:
    """A weights' file as bytes; raises CheckpointError if it is not the one with this SHA-256. Imports no torch."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the weights ({error.strerror})") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise CheckpointError(
            f"{path}: damaged or incomplete: {len(content)} bytes with SHA-256 {digest[:16]}..., the card says "
            f"{sha256[:16] or 'nothing'}...; fetch or register the model again"
        )
    return content


def build(card: Card, weights: Mapping[str, "Tensor"], source: str) -> "Classifier":
    """The network of a card with these weights, in eval mode, on the CPU.

    Raises:
        CheckpointError: names or shapes differ; it names `source` and the layers, and the class count if that is it.
    """
    import torch

    from service import models

    # On the meta device nothing is allocated: a card with absurd sizes costs nothing, and no weight is drawn in vain.
    try:
        with torch.device("meta"):
            module = models.build(ModelConfig(**card.model), card.num_classes, card.num_pretext)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: this network cannot be built: {error}") from None
    check_fit(module.state_dict(), weights, source)
    module.load_state_dict(dict(weights), strict=True, assign=True)
    return module.requires_grad_(True).eval()


def check_fit(expected: Mapping[str, "Tensor"], weights: Mapping[str, "Tensor"], source: str) -> None:
    """Raise CheckpointError unless both have the same names, shapes and types; values are not looked at."""
    for key, what in (("fc.weight", "classes"), ("pretext_fc.weight", "pretext labels")):
        if key in expected and key in weights and len(weights[key]) != len(expected[key]):
            raise CheckpointError(
                f"{source}: the weights are for {len(weights[key])} {what} ({key}), the model has {len(expected[key])}"
            )
    problems = [f"missing: {key}" for key in expected if key not in weights]
    problems += [f"not part of the network: {key}" for key in weights if key not in expected]
    for key in expected:
        if key in weights and (expected[key].shape, expected[key].dtype) != (weights[key].shape, weights[key].dtype):
            problems.append(
                f"{key}: {tuple(weights[key].shape)} {weights[key].dtype}, "
                f"the network has {tuple(expected[key].shape)} {expected[key].dtype}"
            )
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: the weights do not fit the network:\n  " + "\n  ".join(problems[:8]) + more)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
