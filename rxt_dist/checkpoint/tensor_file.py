"""Tensors written as a safetensors file, a block at a time.

The library's own writer takes all tensors in host memory at once, which at a save would be a second copy of everything
that a rank holds, and makes files that only their owner can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from rxt_dist.checkpoint.uncached import UncachedFile

# Elements that are brought to the host, written and hashed at once (2 MB: they stay in the cache of a processor).
_BLOCK_ELEMENTS = 1 << 19
# The data begins at a multiple of this, which lets a reader map it.
_ALIGNMENT = 8
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Described:
    """Type and shape of a tensor that is going to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What its elements take."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of any device and make the file durable. Returns its hex blake3.

    The hash is of what was meant to be written, so that a disk that kept something else is found out by the first
    reader.
    """

    def blocks() -> Iterator[Tensor]:
        for tensor in tensors.values():
            yield from tensor.detach().contiguous().view(-1).split(_BLOCK_ELEMENTS)

    described = {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_blocks(path, described, blocks())


def write_blocks(path: Path, described: Mapping[str, Described], blocks: Iterable[Tensor]) -> str:
    """Write what `described` says, of which `blocks` are the elements, one after another. See `write_tensors`."""
    header = _header(described)
    size = len(header) + sum(tensor.bytes for tensor in described.values())
    digest = blake3()
    # Never over a file that is there: a rank of a life that was cut off may wake in its save of the same step.
    with UncachedFile(path, size) as file:
        for content in chain([np.frombuffer(header, np.uint8)], map(_bytes_of, blocks)):
            file.write(content)
            digest.update(content.data)
    if file.written != size:
        raise ValueError(f"{path} got {file.written} bytes, not the {size} of the tensors that it describes")
    return str(digest.hexdigest())


def _bytes_of(block: Tensor) -> np.ndarray:
    content: np.ndarray = block.cpu().view(torch.uint8).numpy().reshape(-1)
    return content


def _header(described: Mapping[str, Described]) -> bytes:
    """Length of the description in eight bytes, and the description: type, shape and place of each tensor."""
    entries, end = {}, 0
    for name, tensor in described.items():
        if tensor.dtype not in _TYPES:
            raise ValueError(f"'{name}' is {tensor.dtype}, but what is written is {', '.join(map(str, _TYPES))}")
        first, end = end, end + tensor.bytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
