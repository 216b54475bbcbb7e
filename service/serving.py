"""What `mlflow models serve` and `mlflow models predict` run: images in, class probabilities out.

An image goes the way of an evaluation: the same soundness check, the same plan from the card's view, and the torch
reference that the evaluation loader is held to. What a request holds is data from outside; whatever is wrong with it is
answered with status 400 and a sentence.
"""

import base64
import binascii
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import Tensor

from pipelines import image_header, torch_reference
from pipelines.image_header import HeaderError
from pipelines.plan import View, eval_plan
from pipelines.soundness import UnsoundError, sound
from service import bundle
from service.bundle import Card
from service.flavour import IMAGE, LABEL, PIXELS, PROBABILITIES, PROBABILITY, TOP
from service.models import Classifier

# Of one image of a request. A flat picture of a few hundred kilobytes can declare as many pixels as it likes.
MOST_BYTES = 32 << 20
MOST_PIXELS = 64_000_000
# Of one request; each image may cost a second of decoding, and so may some twenty million pixels.
MOST_IMAGES = 1024
MOST_PIXELS_TOGETHER = 1_000_000_000
# Images that go through the network together.
_BATCH = 32
# Only text is made of these alone: every image format has bytes beyond them in its header.
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]++={0,2}\s*+")
_WANTED = (
    f'send one column: "{IMAGE}", the bytes of image files (in JSON: base64), or "{PIXELS}", nested lists '
    "(height, width, 3) of 0 to 255"
)


class Predictor:
    """A model with its preprocessing and its class names."""

    def __init__(self, model: Classifier, card: Card, device: torch.device | None = None) -> None:
        """`model` is put in eval mode; default device: a GPU if there is one."""
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._view = View(**card.view)
        self._classes = named_once(card.classes)

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Class probabilities of every image of a request.

        Args:
            data: a pandas DataFrame, as MLflow makes it of a request, with one of the columns `image` (bytes of an
                image file, or their base64) and `pixels` (nested (height, width, 3) of 0 to 255, R, G, B).
            params: `top`: how many classes to name, the most probable; 0 for all.

        Returns:
            For each image {"label", "probability", "probabilities": {class: probability}}, most probable first.

        Raises:
            MlflowException: with INVALID_PARAMETER_VALUE (status 400): an image is none, damaged, too large, ...
        """
        top = _top(params, len(self._classes))
        samples = _samples(data)
        # All of them before the first is decoded.
        sizes = [_size(row, sample) for row, sample in enumerate(samples)]
        if (together := sum(height * width for height, width in sizes)) > MOST_PIXELS_TOGETHER:
            raise _refused(
                f"the images of the request have {together:,} pixels together, more than the {MOST_PIXELS_TOGETHER:,} "
                "that are taken; send them in several, or shrink them"
            )
        answers: list[dict[str, Any]] = []
        for start in range(0, len(samples), _BATCH):
            rows = range(start, min(start + _BATCH, len(samples)))
            batch = torch.cat([self._render(row, samples[row], *sizes[row]) for row in rows])
            answers += self._answers(batch, top)
        return answers

    @torch.inference_mode()
    def _answers(self, images: Tensor, top: int) -> Iterator[dict[str, Any]]:
        logits = self._model(images.to(self._device)).logits
        # Double, so that the printed digits add up to 1.
        likeliest = logits.double().softmax(1).topk(top, dim=1)
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        return (self._answer(values, indices) for values, indices in rows)

    def _answer(self, values: Sequence[float], indices: Sequence[int]) -> dict[str, Any]:
        named = {self._classes[index]: value for index, value in zip(indices, values, strict=True)}
        return {LABEL: self._classes[indices[0]], PROBABILITY: values[0], PROBABILITIES: named}

    def _render(self, row: int, sample: bytes | np.ndarray, height: int, width: int) -> Tensor:
        """(1, 3, size, size), as evaluation shows it to the network."""
        try:
            readable = sample if isinstance(sample, np.ndarray) else sound(sample, height, width)
        except UnsoundError as error:
            raise _refused(f"image {row}: {error}") from None
        plan = eval_plan(self._view, np.zeros(1, np.int64), np.array([height]), np.array([width]), np.ones(1, bool))
        try:
            return torch_reference.render_batch([readable], self._view, plan)
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
            raise _refused(f"image {row}: the file is damaged: {str(error) or type(error).__name__}") from None


def named_once(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names as keys of an answer: one that stands twice (ImageNet has two cranes) is followed by its number."""
    counts = Counter(classes)
    return tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(classes))


def _load_pyfunc(path: str) -> Predictor:
    """What MLflow calls with a registered model's folder; raises CheckpointError if it is damaged."""
    folder = Path(path)
    card = bundle.read_card(folder)
    return Predictor(bundle.build(card, bundle.read_weights(folder, card), str(folder)), card)


def _samples(data: Any) -> list[bytes | np.ndarray]:
    columns = list(getattr(data, "columns", ()))
    given = [name for name in (IMAGE, PIXELS) if name in columns]
    if len(given) != 1:
        raise _refused(f"the request has {' and '.join(given) or 'neither column'}; {_WANTED}")
    values = list(data[given[0]])
    if len(values) > MOST_IMAGES:
        raise _refused(f"the request has {len(values)} images, more than {MOST_IMAGES}; send them in several")
    read = _encoded if given[0] == IMAGE else _pixels
    return [read(row, value) for row, value in enumerate(values)]


def _encoded(row: int, value: Any) -> bytes:
    """The bytes of an image file, from bytes or from base64."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _refused(f"image {row}: {type(value).__name__} is no image; {_WANTED}")
    content = bytes(value)
    if _BASE64.fullmatch(content):
        try:
            content = base64.b64decode(content)
        except binascii.Error as error:
            raise _refused(f"image {row}: neither an image nor base64 of one: {error}") from None
    if len(content) > MOST_BYTES:
        raise _refused(f"image {row}: {len(content):,} bytes, more than the {MOST_BYTES:,} that are taken; shrink it")
    return content


def _pixels(row: int, value: Any) -> np.ndarray:
    """(H, W, 3) uint8 from nested sequences of numbers."""
    try:
        pixels = np.asarray(value)
        if pixels.dtype == object:  # rows that are arrays themselves
            pixels = np.array([np.asarray(line).tolist() for line in pixels])
        if pixels.dtype.kind not in "uif":
            raise ValueError(f"numbers wanted, not {pixels.dtype}")
    except (ValueError, TypeError) as error:
        raise _refused(f"image {row}: {PIXELS} are no array: {error}; {_WANTED}") from None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise _refused(f"image {row}: {PIXELS} of shape {pixels.shape}; {_WANTED}")
    if pixels.shape[0] * pixels.shape[1] > MOST_PIXELS:
        raise _refused(f"image {row}: more than the {MOST_PIXELS:,} pixels that are taken; shrink it")
    if not ((pixels >= 0) & (pixels <= 255) & (pixels == np.floor(pixels))).all():
        raise _refused(f"image {row}: {PIXELS} are not whole numbers of 0 to 255; they are normalised here")
    return pixels.astype(np.uint8)


def _size(row: int, sample: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width, in pixels, as they are declared; nothing is decoded."""
    if isinstance(sample, np.ndarray):
        return sample.shape[0], sample.shape[1]
    try:
        header = image_header.read(io.BytesIO(sample))
    except HeaderError as error:
        raise _refused(f"image {row}: {error}") from None
    if header.width * header.height > MOST_PIXELS:
        raise _refused(
            f"image {row}: the image declares {header.width} x {header.height} pixels, more than the {MOST_PIXELS:,} "
            "that are taken; shrink it"
        )
    return header.height, header.width


def _top(params: dict[str, Any] | None, num_classes: int) -> int:
    wanted = (params or {}).get(TOP, 0)
    try:
        top = int(wanted)
    except (TypeError, ValueError):
        top = -1
    if top < 0:
        raise _refused(f"{TOP}: {wanted!r} is no number of classes; 0 names all {num_classes}")
    return min(top, num_classes) or num_classes


def _refused(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
