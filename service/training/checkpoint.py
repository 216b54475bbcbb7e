"""Checkpoints: a folder per step, whole or absent. safetensors and JSON only; nothing is unpickled.

    checkpoints/step-00000123/
        weights.safetensors     parameters and buffers by name, float32
        optimizer.safetensors   KEY.PARAMETER, whole, however ZeRO had cut it
        ema.safetensors         with an average only
        checkpoint.json         step, facts, size and SHA-256 of every file, and of itself

Nothing in it depends on the number of workers or the ZeRO stage. Data and augmentation need no state: they are pure
functions of the step.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from service.errors import CheckpointError, StorageError
from service.training import tensor_file

FORMAT = 1
INDEX = "checkpoint.json"
_NAME = re.compile(r"step-([0-9]{8,})")
_FILE = re.compile(r"[a-z]+\.safetensors")
_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose index has been read; `verify` says whether its files are sound.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        facts: what the training loop wrote down, JSON values.
        metrics: of the evaluation at this step; empty if there was none.
        files: name -> {"bytes", "sha256"}.
    """

    path: Path
    step: int
    facts: dict[str, Any]
    metrics: dict[str, float]
    files: dict[str, dict[str, Any]] = field(repr=False)

    def holds(self, part: str) -> bool:
        """Whether it has "weights", "optimizer" or "ema"."""
        return f"{part}.safetensors" in self.files

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of "weights", "optimizer" or "ema", on the CPU; raises CheckpointError if there are none."""
        name = f"{part}.safetensors"
        if name not in self.files:
            raise CheckpointError(f"{self.path}: holds no {part}; it holds {', '.join(self.files)}")
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name}: cannot be read ({error})") from None

    def verify(self) -> None:
        """Compare every file with its size and checksum; raises CheckpointError that names the first that differs."""
        for name, expected in self.files.items():
            path = self.path / name
            try:
                size, digest = path.stat().st_size, _digest(path)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}") from None
            if size != expected["bytes"]:
                raise CheckpointError(f"{path}: {size} bytes, {expected['bytes']} were written; it is truncated")
            if digest != expected["sha256"]:
                raise CheckpointError(f"{path}: its SHA-256 is not the one written down; it is damaged")


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return folder / f"step-{step:08d}"


def beside(path: Path, state: str) -> Path:
    """Where a checkpoint lies while it is being written, or on its way out: no checkpoint by its name."""
    return path.with_name(f".{path.name}.{state}")


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    permit: Callable[[], object] = lambda: None,
) -> Checkpoint:
    """Write `folder/step-XXXXXXXX` whole, or leave the folder as it was. One process may do so at a time.

    Written beside, flushed to the disk, renamed. A checkpoint of the same step is replaced.

    Args:
        parts: name ("weights", "optimizer", "ema") -> tensors, on any device, in any memory format; an empty
            part is written too.
        facts, metrics: JSON values; metrics that are not finite are left out.
        permit: is called before anything in the folder is changed, and before the renaming; what it raises ends it.

    Raises:
        StorageError: the disk is full or cannot be written. What was there before is still there.
    """
    permit()
    target = place(folder, step)
    writing = beside(target, "writing")
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _flush(folder.parent)
        tidy(folder)
        writing.mkdir()
        files = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            files[name] = tensor_file.write(writing / name, tensors)
        finite = {key: float(value) for key, value in (metrics or {}).items() if math.isfinite(value)}
        index = {"format": FORMAT, "step": step, "facts": dict(facts), "metrics": finite, "files": files}
        index["sha256"] = _digest_of_index(index)
        tensor_file.write_bytes(writing / INDEX, [json.dumps(index, indent=1).encode()])
        _flush(writing)
        permit()
        _replace(writing, target)
    except StorageError:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise StorageError(
            f"{target}: cannot write the checkpoint ({error.strerror or error}); the ones before are untouched. "
            "Free some space or set output=FOLDER, and continue with --resume"
        ) from None
    return Checkpoint(target, step, dict(facts), finite, files)


def find(folder: Path) -> list[Path]:
    """Folders of checkpoints, the newest first, whether sound or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read(path: Path) -> Checkpoint:
    """A checkpoint's index, checked against its own checksum; raises CheckpointError."""
    try:
        index = json.loads((path / INDEX).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: no checkpoint of this program ({INDEX}: {error.strerror}){_content(path)}"
        ) from None
    except ValueError:
        raise CheckpointError(f"{path / INDEX}: damaged, it is no JSON") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        given = index.get("format") if isinstance(index, dict) else None
        raise CheckpointError(f"{path / INDEX}: format {given!r}; this version reads format {FORMAT}")
    if index.get("sha256") != _digest_of_index(index):
        raise CheckpointError(f"{path / INDEX}: its SHA-256 is not the one written down; it is damaged")
    if wrong := [name for name, holds in _CONTENT.items() if not holds(index.get(name))]:
        raise CheckpointError(f"{path / INDEX}: not as this program writes it: {', '.join(wrong)}")
    return Checkpoint(path, index["step"], index["facts"], index["metrics"], index["files"])


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint, and why each newer one was passed over. Reads every byte of what it returns.

    It changes nothing; whoever goes on in this folder calls `tidy` first.
    """
    problems = []
    for path in find(folder):
        try:
            checkpoint = read(path)
            checkpoint.verify()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return checkpoint, problems
    return None, problems


def check_fit(where: object, held: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's weights with the model's; raises CheckpointError that names the tensors that differ.

    Args:
        where: for the message.
        held: the checkpoint's tensors by name.
        needed: the model's shapes by name.
    """
    problems = [f"{name}: the model has none" for name in held if name not in needed]
    problems += [f"{name}: missing" for name in needed if name not in held]
    problems += [
        f"{name}: {tuple(held[name].shape)}, the model's is {tuple(shape)}"
        for name, shape in needed.items()
        if name in held and tuple(held[name].shape) != tuple(shape)
    ]
    if not problems:
        return
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    heads = [name for name in ("fc.weight", "pretext_fc.weight") if name in held and name in needed]
    classes = "".join(
        f"; {name.partition('.')[0]} has {held[name].shape[0]} outputs there and {needed[name][0]} here"
        for name in heads
        if held[name].shape[0] != needed[name][0]
    )
    raise CheckpointError(
        f"{where}: it is another model's{classes}. Use the configuration it was trained with, or another name:\n  "
        + "\n  ".join(problems[:_SHOWN])
        + more
    )


def _replace(source: Path, target: Path) -> None:
    """A folder cannot replace one that has content, so the old one steps aside for a moment."""
    aside = beside(target, "old")
    if target.exists():
        target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    # Before the old one goes, the new one's name is on the disk.
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(folder: Path) -> None:
    """What a killed process left: an old checkpoint that had stepped aside goes back, the rest goes.

    For whoever may write here alone: it ends what is being written. Raises OSError.
    """
    for leftover in folder.glob(".step-*"):
        target = leftover.with_name(leftover.stem.removeprefix("."))
        if leftover.suffix == ".old" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=leftover.suffix == ".leaving")


def _content(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        return ""
    return f"; it holds {', '.join(names[:_SHOWN])}" if names else "; it is empty"


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _FILE.fullmatch(name)
        and isinstance(own, dict)
        and isinstance(own.get("bytes"), int)
        and isinstance(own.get("sha256"), str)
        for name, own in value.items()
    )


# What the index has to hold beside its format and checksum.
_CONTENT: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: isinstance(value, int) and value >= 0,
    "facts": lambda value: isinstance(value, dict),
    "metrics": lambda value: isinstance(value, dict) and all(isinstance(own, float) for own in value.values()),
    "files": _are_files,
}


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_index(index: Mapping[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
