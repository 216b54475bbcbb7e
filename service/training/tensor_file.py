"""Writing files of tensors: safetensors' format, hashed on the way to the disk, so that nothing is read back.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape, data_offsets), then the
tensors' bytes without a gap (https://github.com/huggingface/safetensors, "Format").
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What is hashed is still in the processor's cache when it is written.
_CHUNK_BYTES = 1 << 20


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new safetensors file and flush it to the disk; returns its {"bytes", "sha256"}.

    Args:
        path: of a file that does not exist yet.
        tensors: by name, on any device, in any memory format, views of one another too: each is written for itself.

    Raises:
        OSError: it cannot be written; what is there then is not whole.
        KeyError: a type of number that is not written here.
    """
    # The widest numbers first, so that each tensor begins at a multiple of its own width; readers map the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    return write_bytes(path, _pieces(ordered))


def write_bytes(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Write buffers one after another as a new file, and flush it; returns and raises as `write`."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
