"""Weights of places: known numbers, the same on a host and on a device; no pattern of damage is overlooked."""

from __future__ import annotations

import pytest
import torch

from rxt_dist.checkpoint import checksum as module
from rxt_dist.checkpoint.checksum import checksum, wrapped
from rxt_dist.checkpoint.runs import Run

# The first numbers of splitmix64 from state 0, as its authors publish them.
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def run(values: torch.Tensor, start: int = 0) -> Run:
    return Run("weight", "a", start, values)


def weight_of(place: int) -> int:
    block, column = divmod(place, module._BLOCK_ELEMENTS)
    return int(module._weights(module._BLOCK_ELEMENTS)[column]) * module._block_weight(block)


def test_weights_are_odd_and_those_of_a_known_generator() -> None:
    weights = module._weights(1 << 10)
    assert [int(weight) % 2**64 for weight in weights[:3]] == [number | 1 for number in SPLITMIX]
    assert all(int(weight) % 2 for weight in weights)
    blocks = [module._block_weight(block) for block in range(1000)]
    assert len({*blocks, *map(int, weights)}) == 2024
    assert all(weight % 2 for weight in blocks)


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12, 13, 24, 100])
@pytest.mark.parametrize("start", [0, 3, 2**40])
def test_a_host_and_a_device_find_the_same_sum(count: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 12)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int32)
    expected = wrapped(sum(value * weight_of(start + place) for place, value in enumerate(bits.tolist())))
    assert wrapped(module._host_sum(bits, start)) == wrapped(module._device_sum(bits, start)) == expected


def test_blocks_of_the_real_size_add_up() -> None:
    """The largest numbers, whose sums pass 2^64, cut where no block ends."""
    bits = torch.full((1 << 18,), 2**31 - 1, dtype=torch.int32)
    found = wrapped(module._host_sum(bits, 77))
    assert found == wrapped(module._device_sum(bits, 77))
    assert found == wrapped(sum(module._host_sum(part, 77 + 100_000 * n) for n, part in enumerate(bits.split(100_000))))


@pytest.mark.parametrize("spacing", [1, 2, 16, 1 << 16])
@pytest.mark.parametrize("bit", [0, 22, 31])
def test_one_bit_wrong_in_a_row_of_words_is_found(bit: int, spacing: int) -> None:
    """As of a line of a memory or a bus: with weights that grow evenly, words whose bit was 0 1 1 0 cancel out."""
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    words = values.view(torch.int32)
    mask = 1 << bit if bit < 31 else -(1 << 31)
    for place, wanted in enumerate((0, 1, 1, 0)):
        at = 5 + place * spacing
        words[at] = words[at] | mask if wanted else words[at] & ~mask
    sound = checksum(run(values))
    for place in range(4):
        words[5 + place * spacing] ^= mask
    assert (checksum(run(values)) - sound) % 2**64
