"""`lorot export`: a model as another tool's file, compared by that tool's own loading before it is left behind."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from service import registry, scratch_folder
from service.bundle import Card
from service.errors import CheckpointError, ConfigError, StorageError
from service.export import formats
from service.export.formats import Format
from service.models import Classifier
from service.registry import Resolved

# Images that are compared; and then the first of them alone, since the number of images is free.
_COMPARED = 3


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the weights. facts: the JSON beside them.
        difference: largest absolute difference of a logit, between this program and `format`'s tool.
        left_out: names of the tensors that the format has no place for.
        tools: what wrote and read the file, and their versions.
    """

    path: Path
    facts: Path
    format: Format
    difference: float
    left_out: tuple[str, ...]
    tools: dict[str, str]
    model_uri: str


def run(model_uri: str, to: str, output: Path, *, overwrite: bool = False, tracking_uri: str | None = None) -> Exported:
    """Write a model to `output` in the format `to`, with `output` + ".json" beside it that says what it is.

    The file is loaded by the tool that it is for, and both files appear only if its logits are those of the model.

    Args:
        model_uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.
        overwrite: replace what is there; otherwise that is refused.

    Raises:
        ConfigError: no such format, one that has no place for this network, a package that is not installed, a file
            name with another ending, or one that is taken.
        CheckpointError: no such model, it is damaged, or the tool's logits differ by more than the format's tolerance.
        StorageError: the files cannot be written.
        TrackingError: the tracking server does not answer.
    """
    form = formats.named(to)
    tools = form.versions()
    _check_place(output, form, overwrite)
    model, card, resolved = registry.load(model_uri, tracking_uri=tracking_uri)
    network = str(card.model["name"])
    if not form.holds(network):
        fitting = ", ".join(name for name, other in formats.FORMATS.items() if other.holds(network))
        raise ConfigError(f"{resolved.uri}: {form.name} has no network {network}; --to {fitting} would work")
    content = form.encode(model, card)
    left_out = () if form.keeps_pretext else tuple(name for name in model.state_dict() if name.startswith("pretext_"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder.made(output.parent, f".{output.name}-") as beside:
            weights, facts = beside / output.name, beside / f"{output.name}.json"
            _write(weights, content)
            difference = compare(form, weights, model, card)
            description = describe(form, card, resolved, output.name, content, left_out, tools, difference)
            _write(facts, json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False).encode())
            _check_place(output, form, overwrite)
            for made in (weights, facts):
                made.replace(output.parent / made.name)
    except OSError as error:
        raise StorageError(f"{output}: cannot write the model ({error.strerror}); choose another --output") from None
    return Exported(output, _facts_of(output), form, difference, left_out, tools, resolved.uri)


@torch.inference_mode()
def compare(form: Format, path: Path, model: Classifier, card: Card) -> float:
    """The largest difference of a logit between `model` and what the format's tool makes of the file.

    Raises:
        CheckpointError: it is above the format's tolerance, or the tool cannot load the file.
    """
    size = int(card.view["size"])
    images = torch.randn(_COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0))
    differences = []
    for batch in (images, images[:1]):
        expected = model.eval()(batch).logits
        try:
            found = form.logits(path, card, batch)
        except Exception as error:
            # Whatever the tool raises: the file that was to be its own is none.
            raise CheckpointError(
                f"{form.name} does not load what was written for it ({type(error).__name__}: {error}); nothing was "
                "exported; report this with `lorot version`"
            ) from error
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{form.name} gives logits of shape {tuple(found.shape)}, the model {tuple(expected.shape)}; nothing "
                "was exported"
            )
        differences.append((found - expected).abs().max())
    # Tensors, because Python's max passes over NaN; and not "above", which NaN never is.
    difference = float(torch.stack(differences).max())
    if not difference <= form.tolerance:
        raise CheckpointError(
            f"{form.name} gives other logits than the model, up to {difference:.2g} off where {form.tolerance:g} is "
            "accepted; nothing was exported"
        )
    return difference


def describe(
    form: Format,
    card: Card,
    resolved: Resolved,
    name: str,
    content: bytes,
    left_out: tuple[str, ...],
    tools: dict[str, str],
    difference: float,
) -> dict[str, Any]:
    """What stands beside the weights: how to load them, what goes in and comes out, and where they are from."""
    size, network = int(card.view["size"]), str(card.model["name"])
    usage = form.usage.format(network=network, num_classes=card.num_classes, file=name)
    return {
        "file": name,
        "format": form.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "load": usage,
        "network": card.model,
        "input": {"name": "images", "shape": ["N", 3, size, size], "dtype": "float32", "channels": "RGB"},
        "output": {"name": "logits", "shape": ["N", card.num_classes], "dtype": "float32"},
        "classes": list(card.classes),
        "preprocessing": {"steps": preprocessing(card.view), **card.view},
        "pretext": {
            "name": card.pretext,
            "options": card.pretext_options,
            "num_labels": card.num_pretext,
            "left_out": list(left_out),
        },
        "check": {"largest_difference": difference, "tolerance": form.tolerance, "versions": tools},
        "lineage": {
            "model": resolved.uri,
            "name": resolved.name,
            "version": resolved.version,
            "run_id": card.run_id,
            "run_name": card.run_name,
            "data": card.data,
            "data_digest": card.data_digest,
            "objective": card.objective,
            "metrics": card.metrics,
            "weights_sha256": card.weights_sha256,
            "versions": card.versions,
            "origin": card.origin,
        },
    }


def preprocessing(view: dict[str, Any]) -> list[str]:
    """A card's view in words, step by step."""
    size, share = int(view["size"]), float(view["eval_crop"])
    crop = [f"cut the centred square whose side is {share:g} of the short side"]
    return [
        "decode to RGB, turned as EXIF says",
        *(crop if view["crop"] == "random_resized" else []),
        f"resize to {size} x {size}, bilinear, antialiased",
        "divide by 255",
        f"subtract {list(view['mean'])} and divide by {list(view['std'])}",
    ]


def show(exported: Exported, console: Console) -> None:
    """Print what was written, and how far the tool's logits are from the model's."""
    form, tool = exported.format, ", ".join(f"{name} {version}" for name, version in exported.tools.items())
    lines = [
        f"{exported.model_uri} -> {exported.path}",
        f"loaded with {tool}: largest difference of a logit {exported.difference:.2g} (accepted: {form.tolerance:g})",
        f"classes, preprocessing and lineage: {exported.facts}",
    ]
    if exported.left_out:
        keeping = " and ".join(name for name, other in formats.FORMATS.items() if other.keeps_pretext)
        lines.append(f"left out: the pretext head, for which {form.name} has no place; {keeping} keep it")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _facts_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _check_place(output: Path, form: Format, overwrite: bool) -> None:
    if output.suffix.lower() != form.suffix:
        raise ConfigError(
            f"--output {output}: {form.name} files end in {form.suffix}; {output.with_suffix(form.suffix)} would work"
        )
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; write the path of a file in it")
    taken = [str(path) for path in (output, _facts_of(output)) if os.path.lexists(path)]
    if taken and not overwrite:
        raise ConfigError(f"--output {output}: {' and '.join(taken)} exist; choose another, or add --overwrite")


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
