"""Float32 tensors written as a safetensors file, a block at a time.

The library's own writer takes all tensors in host memory at once, which at a save would be a second copy of everything
that a rank holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Elements that are brought to the host, written and hashed at once (16 MB).
_BLOCK_ELEMENTS = 1 << 22
# The data begins at a multiple of this, which lets a reader map it.
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write float32 tensors [n] of any device and make the file durable. Returns its hex sha256.

    The hash is of what was meant to be written, so that a disk that kept something else is found out by the first
    reader.
    """
    header = _header(tensors)
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for tensor in tensors.values():
            for block in tensor.detach().split(_BLOCK_ELEMENTS):
                content = memoryview(block.cpu().contiguous().numpy()).cast("B")
                file.write(content)
                digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length of the description in eight bytes, and the description: type, shape and place of each tensor."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1:
            raise ValueError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, not float32 [n]")
        first, end = end, end + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
