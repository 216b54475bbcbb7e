"""The formats a model is exported to: how its file is written, and how the tool it is for reads it back.

torchvision and timm know networks by name and want exactly their tensors, so the pretext head, which they have no place
for, is left out; so it is in ONNX, where a program has one answer. safetensors and pytorch hold every tensor under this
project's names, which for the ImageNet ResNets are torchvision's and `pretext_fc.*`.
"""

import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from service import bundle
from service.bundle import Card
from service.errors import ConfigError
from service.models import Classifier

# What torchvision and timm have, tensor by tensor.
_IMAGENET_RESNETS = frozenset({"resnet18", "resnet34", "resnet50", "resnet101"})
_PRETEXT = "pretext_fc."

Encode = Callable[[Classifier, Card], bytes]
Logits = Callable[[Path, Card, Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as it is asked for.
        suffix: what the file's name ends in.
        packages: what has to be installed, to write the file and to check it.
        networks: those it can hold; None for all.
        keeps_pretext: the pretext head is in the file, if the model has one.
        tolerance: largest difference of a logit that is accepted, between this program and the tool.
        encode: the file's content.
        logits: (N, num_classes) of (N, 3, size, size) images, from the file alone, by the tool.
        usage: a line of code or a sentence that loads it.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    networks: frozenset[str] | None
    keeps_pretext: bool
    tolerance: float
    encode: Encode
    logits: Logits
    usage: str

    def holds(self, network: str) -> bool:
        """Whether the format has a place for this network."""
        return self.networks is None or network in self.networks

    def versions(self) -> dict[str, str]:
        """Installed versions of what wrote and read the file; raises ConfigError with what is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"--to {self.name} writes and checks its file with {', '.join(self.packages)}, and there is no "
                f"{', '.join(missing)} here; `pip install {' '.join(missing)}` gets it"
            )
        return {name: importlib.metadata.version(name) for name in self.packages}


def named(name: str) -> Format:
    """The format of that name; raises ConfigError with those there are."""
    if name not in FORMATS:
        raise ConfigError(f"--to {name}: there is no such format; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _tensors(model: Classifier, pretext: bool) -> dict[str, Tensor]:
    state: Mapping[str, Tensor] = model.state_dict()
    kept = {name: value for name, value in state.items() if pretext or not name.startswith(_PRETEXT)}
    return {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}


def _safetensors(pretext: bool) -> Encode:
    from safetensors.torch import save

    # The metadata is how Hugging Face's tools tell whose tensors these are.
    return lambda model, card: bytes(save(_tensors(model, pretext), metadata={"format": "pt"}))


def _pickled(pretext: bool) -> Encode:
    def encode(model: Classifier, card: Card) -> bytes:
        stream = io.BytesIO()
        torch.save(_tensors(model, pretext), stream)
        return stream.getvalue()

    return encode


class _Answer(nn.Module):
    """The class logits alone, as one tensor."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        logits: Tensor = self.model(images).logits
        return logits


def _onnx(model: Classifier, card: Card) -> bytes:
    size = int(card.view["size"])
    # Two images, since a batch of one would be taken for a constant.
    example = torch.zeros(2, 3, size, size)
    program = torch.onnx.export(
        _Answer(model).eval(),
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise AssertionError("the exporter returns its program when it is given no file")
    return bytes(program.model_proto.SerializeToString())


def _by_torchvision(path: Path, card: Card, images: Tensor) -> Tensor:
    import torchvision

    network = getattr(torchvision.models, card.model["name"])(weights=None, num_classes=card.num_classes)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    logits: Tensor = network.eval()(images)
    return logits


def _by_timm(path: Path, card: Card, images: Tensor) -> Tensor:
    import timm

    name, num_classes = card.model["name"], card.num_classes
    network = timm.create_model(name, pretrained=False, num_classes=num_classes, checkpoint_path=str(path))
    logits: Tensor = network.eval()(images)
    return logits


def _by_onnxruntime(path: Path, card: Card, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answer: Tensor = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    return answer


def _by_safetensors(path: Path, card: Card, images: Tensor) -> Tensor:
    from safetensors.torch import load_file

    return _rebuilt(load_file(path), path, card, images)


def _by_pytorch(path: Path, card: Card, images: Tensor) -> Tensor:
    return _rebuilt(torch.load(path, map_location="cpu", weights_only=True), path, card, images)


def _rebuilt(weights: Mapping[str, Tensor], path: Path, card: Card, images: Tensor) -> Tensor:
    logits: Tensor = bundle.build(card, weights, str(path))(images).logits
    return logits


FORMATS = {
    part.name: part
    for part in (
        Format(
            name="torchvision",
            suffix=".pth",
            packages=("torch", "torchvision"),
            networks=_IMAGENET_RESNETS,
            keeps_pretext=False,
            tolerance=1e-5,
            encode=_pickled(pretext=False),
            logits=_by_torchvision,
            usage="torchvision.models.{network}(num_classes={num_classes}).load_state_dict("
            "torch.load({file!r}, weights_only=True))",
        ),
        Format(
            name="timm",
            suffix=".safetensors",
            packages=("timm", "safetensors"),
            networks=_IMAGENET_RESNETS,
            keeps_pretext=False,
            tolerance=1e-5,
            encode=_safetensors(pretext=False),
            logits=_by_timm,
            usage="timm.create_model({network!r}, num_classes={num_classes}, checkpoint_path={file!r})",
        ),
        Format(
            name="onnx",
            suffix=".onnx",
            packages=("torch", "onnx", "onnxscript", "onnxruntime"),
            networks=None,
            keeps_pretext=False,
            tolerance=1e-4,
            encode=_onnx,
            logits=_by_onnxruntime,
            usage="onnxruntime.InferenceSession({file!r}).run(['logits'], {{'images': images}})",
        ),
        Format(
            name="safetensors",
            suffix=".safetensors",
            packages=("safetensors",),
            networks=None,
            keeps_pretext=True,
            tolerance=1e-5,
            encode=_safetensors(pretext=True),
            logits=_by_safetensors,
            usage="safetensors.torch.load_file({file!r})",
        ),
        Format(
            name="pytorch",
            suffix=".pt",
            packages=("torch",),
            networks=None,
            keeps_pretext=True,
            tolerance=1e-5,
            encode=_pickled(pretext=True),
            logits=_by_pytorch,
            usage="torch.load({file!r}, weights_only=True)",
        ),
    )
}
