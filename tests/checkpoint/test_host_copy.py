"""The copy that training goes on beside: all of a state, in memory that every save uses again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rxt_dist.checkpoint import host_copy
from rxt_dist.checkpoint.host_copy import HostCopy
from rxt_dist.checkpoint.writing import Share
from rxt_dist.engine.interface import KINDS, Fragment

CPU = torch.device("cpu")


def share(*sizes: int) -> Share:
    fragments = [
        Fragment(f"p{number}", number, {kind: torch.randn(size, requires_grad=kind == "weight") for kind in KINDS})
        for number, size in enumerate(sizes)
    ]
    return Share(0, fragments, {"counts": torch.arange(3)})


def same(one: Share, other: Share) -> bool:
    pairs = zip(one.fragments, other.fragments, strict=True)
    return torch.equal(one.routing["counts"], other.routing["counts"]) and all(
        (first.name, first.start) == (second.name, second.start)
        and all(torch.equal(first.tensors[kind], second.tensors[kind]) for kind in KINDS)
        for first, second in pairs
    )


@pytest.mark.parametrize("block", [1, 3, 4, 1 << 22])
def test_every_block_of_every_tensor_is_copied(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "_BLOCK_ELEMENTS", block)
    taken = share(7, 1, 12)
    copied = HostCopy(CPU).take(taken, 0)
    assert same(copied, taken)
    with torch.no_grad():
        for fragment in taken.fragments:
            for tensor in fragment.tensors.values():
                tensor += 1
    assert not any(
        torch.equal(first.tensors[kind], second.tensors[kind])
        for first, second in zip(copied.fragments, taken.fragments, strict=True)
        for kind in KINDS
    )


def test_the_memory_is_used_again_and_given_back() -> None:
    copies = HostCopy(CPU)
    places = {copies.take(share(5, 9), 0).fragments[0].tensors["weight"].data_ptr() for _ in range(3)}
    assert len(places) == 1
    other = share(6)
    assert same(copies.take(other, 0), other)
    copies.close()
    assert same(copies.take(other, 0), other)


def test_what_does_not_change_is_not_copied() -> None:
    taken = share(4, 5)
    copied = HostCopy(CPU).take(taken, 1)
    assert copied.fragments[1] is taken.fragments[1]
    assert same(copied, taken)
    assert same(HostCopy(CPU).take(taken, 2), taken)


def test_the_memory_is_this_process_s_own_and_in_large_pages() -> None:
    """Shared memory would let a forked process write into a checkpoint, and has small pages."""
    elements = 1 << 22
    memory = host_copy._new_memory(elements)
    memory.fill_(1)
    first = memory.data_ptr()
    lines = Path("/proc/self/smaps").read_text().split("VmFlags:")
    own = next(text for text in lines if _covers(text, first + 2 * elements))
    flags = lines[lines.index(own) + 1].splitlines()[0].split()
    assert "sh" not in flags
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert "hg" in flags or not pages.exists()


def _covers(text: str, address: int) -> bool:
    head = next(line for line in text.splitlines() if "-" in line.split()[0] and not line.split()[0].endswith(":"))
    begin, end = (int(part, 16) for part in head.split()[0].split("-"))
    return begin <= address < end
