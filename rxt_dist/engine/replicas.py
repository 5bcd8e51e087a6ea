"""Whether ranks that hold the same weights still hold the same bits.

Memory and links of a large cluster flip bits now and then, and a copy that differs in one trains on unnoticed: every
rank's gradients still look sound. Each rank sums the bits of what it holds in common with others, on its device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rxt_dist.engine.collectives import Collectives


def bit_sum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """int64 on the device: the sum of the bits of all tensors modulo 2^64, read as whole numbers.

    One flipped bit changes it by a power of two. Each tensor counts by its place, so that two that were exchanged show.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for place, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1)
        width = 8 // flat.element_size()
        whole = flat.numel() // width * width
        # A view of eight bytes each is read eight times as fast, but must begin at a multiple of them.
        if flat.storage_offset() % width == 0 and whole:
            total += flat[:whole].view(torch.int64).sum() * (2 * place + 1)
            flat = flat[whole:]
        if flat.numel():
            words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
            total += flat.view(words).sum(dtype=torch.int64) * (2 * place + 1)
    return total


def differing_ranks(ranks: Collectives, sums: Sequence[Tensor], group: int) -> list[int]:
    """The ranks whose weights are not those of the others; all ranks together, and all learn the same.

    Where most ranks agree, those that do not are named; without a majority (of two ranks) all of them.

    Args:
        sums: int64 each: of what all ranks hold, and of what those hold that have the same `group` (of experts).
    """
    if ranks.world_size == 1:
        return []
    table = torch.zeros((ranks.world_size, 3), dtype=torch.int64, device=ranks.device)
    table[ranks.rank, 0], table[ranks.rank, 1] = sums[0], sums[1]
    table[ranks.rank, 2] = group
    rows = ranks.sum(table).tolist()
    found = set(_minority({rank: row[0] for rank, row in enumerate(rows)}))
    for one in {row[2] for row in rows}:
        found.update(_minority({rank: row[1] for rank, row in enumerate(rows) if row[2] == one}))
    return sorted(found)


def _minority(values: dict[int, int]) -> list[int]:
    value, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        return list(values)
    return [rank for rank, own in values.items() if own != value]
