"""A turn costs what the first one did: the same positions computed, and nothing kept that grows."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from answering import assistant_of

from rxt_dist.inference import Sampling

TURNS = 64


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def tensors_kept() -> tuple[int, int]:
    """How many tensors there are, and how many elements they have."""
    gc.collect()
    found = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return len(found), sum(value.numel() for value in found)


@pytest.mark.slow
def test_sixty_four_turns(tmp_path: Path) -> None:
    assistant = assistant_of(tmp_path, "decoder.stateless_before=[]", "decoder.stateless_after=[]")
    with torch.no_grad():
        assistant.network.lm_head.output.bias[3] = -1e9  # every answer fills its limit
    computed: list[int] = []
    assistant.network.embedding.register_forward_hook(lambda _, args, out: computed.append(args[0].numel()))
    session = assistant.session()
    work, kept, sizes = [], [], []
    for turn in range(TURNS):
        computed.clear()
        assistant.answer([session], ["the same question"], Sampling(max_tokens=3))
        assert session.moved
        work.append(sum(computed))
        if turn in (8, TURNS - 1):
            kept.append(tensors_kept())
            sizes.append(resident())
    assert len(set(work)) == 1, "the same positions are computed in every turn"
    assert kept[0] == kept[1], "nothing is kept from turn to turn but the memory"
    assert sizes[-1] - sizes[0] < 8e6
    assert session.turn == TURNS
