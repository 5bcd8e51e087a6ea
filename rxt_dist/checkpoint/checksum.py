"""A checksum of a training state that does not depend on how ranks share it.

It is the sum over all numbers of their bits times a weight of their place, modulo 2^64. Weights are odd and look drawn
(multilinear hashing), so that another value in one place always changes the sum, and damage of several that knows
nothing of the weights leaves it with a probability of 2^-32 at most: each differs by less than 2^32, and its weight has
63 free bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rxt_dist.checkpoint.runs import Run

# Places from one weight to the next of the same column; what is made of so many elements stays in a processor's cache.
_BLOCK_ELEMENTS = 1 << 16
# Weights of blocks are drawn from where those of columns do not reach.
_FIRST_BLOCK = 1 << 32


def checksum(run: Run) -> int:
    """A run's part of the sum: that of a whole is the sum of those of its parts."""
    total = _host_sum if run.values.device.type == "cpu" else _device_sum
    return total(run.values.detach().view(torch.int32), run.start) * (zlib.crc32(f"{run.kind}|{run.name}".encode()) | 1)


def wrapped(total: int) -> int:
    """A sum modulo 2^64, as a signed number of 64 bits."""
    return (total + 2**63) % 2**64 - 2**63


def _host_sum(values: Tensor, start: int) -> int:
    """The sum of values [n] (int32) times the weights of the places from `start` on.

    numpy, since torch would begin as many threads in each of ours as the machine has processors.
    """
    found, weights, total = values.numpy(), _weights(_BLOCK_ELEMENTS), 0
    room = np.empty(min(_BLOCK_ELEMENTS, len(found)), np.int64)
    for first, end, column, block in _cuts(start, len(found)):
        products = room[: end - first]
        np.copyto(products, found[first:end])
        products *= weights[column : column + end - first]
        total += int(products.sum()) * _block_weight(block)
    return total


def _device_sum(values: Tensor, start: int) -> int:
    """As `_host_sum`, without a wait for the device before the end: its int64 products and sums wrap around as well."""
    weights = _weights_on(_BLOCK_ELEMENTS, values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first, end, column, block in _cuts(start, values.numel()):
        products = values[first:end].to(torch.int64).mul_(weights[column : column + end - first])
        total += products.sum() * _block_weight(block)
    return int(total.item())


def _cuts(start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, end, column of the first, block) of the parts of `length` elements that lie in one block each, where the
    first element has the place `start`."""
    first = 0
    while first < length:
        block, column = divmod(start + first, _BLOCK_ELEMENTS)
        end = min(length, first + _BLOCK_ELEMENTS - column)
        yield first, end, column, block
        first = end


@cache
def _weights(count: int) -> np.ndarray:
    """int64 [count], one a column."""
    return (_mixed(np.arange(count, dtype=np.uint64)) | np.uint64(1)).view(np.int64)


@cache
def _weights_on(count: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_weights(count)).to(device)


def _block_weight(block: int) -> int:
    return wrapped(int(_mixed(np.array([_FIRST_BLOCK + block], np.uint64))[0]) | 1)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 of its states `numbers` (Steele, Lea, Flood 2014), uint64."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
