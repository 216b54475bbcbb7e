"""Reading a file of weights that somebody else has written: tensors only, and not more of them than the file can hold.

PyTorch's files are pickles. What they would do is looked at first (`service.importing.pickles`). Then they are read
with `weights_only`, by which an unpickler that knows tensors, containers and numbers refuses everything else
(https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
"""

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.errors import CheckpointError
from service.importing import pickles

# ResNet-101 with its optimizer's state has 0.36 GB.
LARGEST_BYTES = 4 << 30
_LARGEST_ENTRIES = 100_000
# Of a file older than PyTorch 1.6: a magic number, the protocol, the machine, the content, and the storages' keys.
_OLD_PICKLES = 5
# Where training programs keep the weights among other things. An average has to be asked for.
ENTRIES = ("state_dict", "model", "model_state_dict", "net", "weights")
_AVERAGES = ("state_dict_ema", "model_ema", "ema")
_ADVICE = (
    "in an environment where you trust it, load it and write torch.save(checkpoint['state_dict'], FILE), or "
    "safetensors.torch.save_file"
)
_KINDS = "a .pth, .pt or .pth.tar file that torch.save wrote, or a .safetensors file"


@dataclass(frozen=True)
class Foreign:
    """The tensors of a file, by the names they have in it.

    Attributes:
        sha256: of the whole file. bytes: its size.
        entry: under which key they lay; empty if the file holds nothing else.
        others: the file's other entries, which were not used.
    """

    tensors: dict[str, Tensor]
    sha256: str
    bytes: int
    entry: str
    others: tuple[str, ...]


def read(path: Path, entry: str | None = None) -> Foreign:
    """The tensors of a file of weights, on the CPU.

    Args:
        entry: key of the mapping that holds the weights; default: the usual ones, else the file's own mapping.

    Raises:
        CheckpointError: no such file, too large, damaged, no weights, or a pickle that wants more than tensors.
    """
    content = _content(path)
    digest = hashlib.sha256(content).hexdigest()
    if content.startswith((b"PK\x03\x04", b"\x80")):
        found = _unpickled(content, path)
    elif len(content) > 9 and content[8:9] == b"{":
        found = _safetensors(content, path)
    else:
        raise CheckpointError(f"{path}: neither PyTorch's format nor safetensors; {_KINDS} would work")
    chosen, tensors, others = _entry(found, entry, path)
    declared = sum(value.numel() * value.element_size() for value in tensors.values())
    # Views of a few bytes can have any shape. Weights are all there, each for itself.
    if declared > len(content):
        raise CheckpointError(
            f"{path}: has {len(content):,} bytes, and its tensors would take {declared:,}; a file that holds every "
            "weight once would work"
        )
    return Foreign(tensors, digest, len(content), chosen, others)


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; {_KINDS} would work")
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes are no weights of a network known here; at most {LARGEST_BYTES:,} are read"
            )
        # Once, so that what was hashed is what is loaded.
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_KINDS} would work") from None


def _unpickled(content: bytes, path: Path) -> Any:
    if content.startswith(b"PK"):
        _check_archive(content, path)
    try:
        _check_pickles(content)
    except pickles.RefusedError as error:
        raise CheckpointError(
            f"{path}: wants more than tensors: unpickling it would {error}, which is not done here; {_ADVICE}"
        ) from None
    except Exception as error:  # PyTorch's reader of archives, and what pickletools raises on damaged files
        raise CheckpointError(f"{path}: {_reason(' '.join(str(error).split()))}") from None
    try:
        with warnings.catch_warnings():
            # PyTorch's advice about old files is not for this command's user.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # What an unpickler can raise on damaged files is not written anywhere.
        raise CheckpointError(f"{path}: {_reason(' '.join(str(error).split()))}") from None


def _check_pickles(content: bytes) -> None:
    """Raise what `pickles.check` does, or RuntimeError for an archive that PyTorch cannot read."""
    if not content.startswith(b"PK"):
        pickles.check(io.BytesIO(content), _OLD_PICKLES, len(content))
        return
    # The reader that torch.load has: another one might find another entry by the same name.
    archive = torch._C.PyTorchFileReader(io.BytesIO(content))
    if "constants.pkl" in archive.get_all_records():
        raise RuntimeError("TorchScript")
    pickles.check(io.BytesIO(archive.get_record("data.pkl")), 1, len(content))


def _reason(text: str) -> str:
    """What went wrong in torch.load, in a sentence with what would work."""
    if "TorchScript" in text:
        return f"is a TorchScript program, not weights; {_ADVICE} of its state_dict()"
    if wanted := re.search(r"unsupported (?:global: )?GLOBAL (\S+)", text, re.IGNORECASE):
        return f"wants more than tensors: unpickling it would run {wanted[1]}, which is not done here; {_ADVICE}"
    if "Weights only load failed" in text:
        # What PyTorch says besides is how to load the file all the same.
        detail = re.split(r"WeightsUnpickler error:|\(1\) ", text)[-1].strip()
        return f"wants more than tensors, which is not done here ({detail[:200]}); {_ADVICE}"
    return f"damaged, or not written by torch.save ({text[:200] or 'it ends too early'}); fetch it again"


def _check_archive(content: bytes, path: Path) -> None:
    """torch.save stores without compression: what would unpack to more than the file has is no checkpoint."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete ({error}); fetch it again") from None
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _LARGEST_ENTRIES or unpacked > len(content):
        raise CheckpointError(
            f"{path}: {len(entries):,} entries that unpack to {unpacked:,} bytes, in a file of {len(content):,}; "
            "torch.save does not write such files"
        )


def _safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def _entry(found: Any, entry: str | None, path: Path) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    if isinstance(found, Tensor) or not isinstance(found, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(found).__name__}, not a mapping of names to tensors; save a state_dict()"
        )
    keys = tuple(str(key) for key in found)
    if entry is not None and entry not in found:
        raise CheckpointError(f"{path}: has no entry {entry!r}; there are {_listed(keys)}")
    chosen = entry or next((name for name in ENTRIES if isinstance(found.get(name), Mapping)), "")
    weights = found[chosen] if chosen else found
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path}: {chosen!r} is a {type(weights).__name__}, not a mapping of names to tensors")
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    strange = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        averages = [name for name in _AVERAGES if name in keys]
        hint = f"; --entry {averages[0]} would choose the average" if averages else "; choose one with --entry"
        raise CheckpointError(
            f"{path}: {chosen or 'the file'} holds {'no tensors' if not tensors else 'more than tensors'}: "
            f"{_listed(strange) or 'nothing'}{hint}"
        )
    for name, value in tensors.items():
        # Neither has elements in the file that could be compared or copied.
        if value.is_meta or value.layout != torch.strided:
            kind = "no values (it is on the meta device)" if value.is_meta else f"a {value.layout} layout"
            raise CheckpointError(f"{path}: {name} has {kind}; save a state_dict() of dense tensors with their values")
    return chosen, tensors, tuple(key for key in keys if key != chosen) if chosen else ()


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
