"""A trained detector as two files: `detector.safetensors`, the weights, and `detector.json`, the card to them.

It lies with the run that trained it. What `service.bundle` says of a classifier's card and weights holds here too: both
are data from outside and are checked before anything is built from them, and nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from service import bundle
from service.bundle import Text
from service.config import ModelConfig
from service.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from service.models.detectors import Detector

CARD = "detector.json"
WEIGHTS = "detector.safetensors"
_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class DetectorCard:
    """What one has to know to use the weights, and where they come from.

    Attributes:
        job: what it finds: "detect", boxes; "segment", masks.
        name, options: as `service.models.detectors.build` takes them.
        trunk: the `model` block of the classifier whose trunk it has.
        classes: class names, in the order of the labels.
        class_ids: how the data set's files call them, in the same order.
        short_side, long_side: of the input, pixels: the short side becomes the one, but the long side no more than the
            other.
        mean, std: of the input, per channel, on a scale of 0 to 1.
        backbone: the model it began with: uri, weights_sha256, run_id.
        data, data_digest, eval_digest: name of the data set, and digests of the splits it learnt and was scored on.
        metrics: of the last evaluation, by name.
        run_id, run_name: the MLflow run that made it.
        versions: of the code and its packages.
        weights_sha256: of the weights' file, 64 hex digits; set by `write`.
        format: of these files.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    job: Literal["detect", "segment"]
    name: Text
    trunk: dict[Text, Any]
    classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1_000_000)]
    short_side: Annotated[int, Field(ge=1, le=100_000)]
    long_side: Annotated[int, Field(ge=1, le=100_000)]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[Text, Any] = field(default_factory=dict)
    class_ids: tuple[Text, ...] = ()
    backbone: dict[Text, Text] = field(default_factory=dict)
    data: Text = ""
    data_digest: Text = ""
    eval_digest: Text = ""
    metrics: dict[Text, float] = field(default_factory=dict)
    run_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{0,256}$")] = ""
    run_name: Text = ""
    versions: dict[Text, Text] = field(default_factory=dict)
    weights_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    format: Literal[1] = 1


_CARD_TYPE = TypeAdapter(DetectorCard)


def write(folder: Path, weights: Mapping[str, "Tensor"], card: DetectorCard) -> DetectorCard:
    """Write `folder` whole, or leave what was there; returns the card with the weights' checksum.

    Args:
        weights: on any device, in any memory format.

    Raises:
        CheckpointError: the card would not be accepted when it is read.
        StorageError: the disk is full or cannot be written.
    """
    from safetensors.torch import save

    # Clones, because safetensors refuses tensors that share memory, as ZeRO's views do.
    content = save({key: value.detach().cpu().contiguous().clone() for key, value in weights.items()})
    card = dataclasses.replace(
        card,
        metrics={key: float(value) for key, value in card.metrics.items() if math.isfinite(value)},
        weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    text = json.dumps(dataclasses.asdict(card), indent=1, ensure_ascii=False, allow_nan=False).encode()
    _parse(text, str(folder / CARD))
    bundle.write_folder(folder, {WEIGHTS: content, CARD: text})
    return card


def read_card(folder: Path) -> DetectorCard:
    """The checked card of a detector; raises CheckpointError with everything that is wrong with it."""
    path = folder / CARD
    try:
        with path.open("rb") as file:
            text = file.read(_CARD_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no detector here ({CARD}: {error.strerror}); the folder of a finished `lorot detect` or "
            "`lorot segment` run holds one in detector/"
        ) from None
    if len(text) > _CARD_BYTES:
        raise CheckpointError(f"{path}: more than {_CARD_BYTES} bytes: this is no detector's card")
    return _parse(text, str(path))


def load(folder: Path) -> tuple["Detector", DetectorCard]:
    """The detector with its weights, in eval mode on the CPU, and its card.

    Raises:
        CheckpointError: there is none, it is damaged, or card and weights are not of one network: which layers.
    """
    import torch

    from service import models
    from service.models import detectors

    card = read_card(folder)
    weights = bundle.read_tensors(folder / WEIGHTS, card.weights_sha256)
    trunk_config = ModelConfig.model_validate_json(json.dumps(card.trunk), strict=True)
    # As in `bundle.build`: on the meta device a card with absurd sizes costs nothing.
    try:
        with torch.device("meta"):
            trunk = models.build(trunk_config, 1, 0)
            detector = detectors.build(card.name, trunk, len(card.classes), **card.options)
    except (RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: this detector cannot be built: {error}") from None
    bundle.check_fit(detector.state_dict(), weights, str(folder))
    detector.load_state_dict(weights, strict=True, assign=True)
    return detector.eval(), card


def _parse(text: bytes, source: str) -> DetectorCard:
    try:
        card = _CARD_TYPE.validate_json(text)
        ModelConfig.model_validate_json(json.dumps(card.trunk), strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:10]]
        more = "\n  ".join(problems)
        raise CheckpointError(f"{source}: not a detector's card this version reads:\n  {more}") from None
    problems = [f"mean: {card.mean} is not finite"] if not all(map(math.isfinite, card.mean)) else []
    if not all(0 < value < math.inf for value in card.std):
        problems.append(f"std: {card.std} is not above 0 and finite")
    if problems:
        raise CheckpointError(f"{source}: no preprocessing that this version knows:\n  " + "\n  ".join(problems))
    return card
