"""Initial weights: every choice that differs from the published systems, and why, in this one place.

Kept: norms 1, biases 0, residual memory gates at their configured start (3.0), and the embedding N(0, 1). The last is
no matter of taste here: pre-training adds noise of an absolute level to the encoder's residual stream, and a
stream that starts at 1 / sqrt(D) drowns in it (with such an embedding the demo model never learnt to read its memory).

Different:

- Linear layers and experts N(0, 1 / (5 D)) (0.02 at width 512), and the projections that write to the residual stream
  divided by sqrt(2 * layers) (Radford et al. 2019), so that the stream's variance does not grow with depth.
- Attention gates N(0, 0.02^2): published code draws them from N(1, 0.01), which saturates 84 % of the gates at start.

Each parameter has a generator of its own, keyed by (seed, name): the same weights whatever else is built, and in
whatever order or on whatever rank. A rank that holds a piece of a parameter draws all that stands before it too, a
little at a time, and keeps its piece.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rxt_dist.model.attention import SparseQueryAttention
from rxt_dist.model.experts import ExpertStack
from rxt_dist.model.feedforward import DenseFeedForward
from rxt_dist.model.memory import ResidualGate
from rxt_dist.model.moe import SharedExperts
from rxt_dist.model.reactive import ReactiveTransformer

GATE_STD = 0.02
# Numbers that are drawn at once (4 MB). torch draws normal numbers in groups of 16: two parts of a tensor get what the
# whole would if the first is a multiple of that, and the second not less.
_DRAWN, _GROUP = 1 << 20, 16


@dataclass(frozen=True)
class _Law:
    """How a parameter of so many elements begins: N(0, std^2), or one value where std is None."""

    elements: int
    std: float | None
    value: float = 0.0


class InitialWeights:
    """The weights that a network begins with, to be had in pieces.

    Args:
        model: a network as it was built, before an engine changes it; without weights (meta) will do.
    """

    def __init__(self, model: ReactiveTransformer, seed: int) -> None:
        self._seed = seed
        self._laws: dict[str, _Law] = {}
        stds = {id(parameter): std for parameter, std in _standard_deviations(model)}
        for path, module in model.named_modules():
            for field, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{field}" if path else field
                value = _constant(module, field)
                self._laws[name] = _Law(parameter.numel(), stds.get(id(parameter)), value)

    @torch.no_grad()
    def fill(self, runs: Iterable[tuple[str, int, Tensor]]) -> None:
        """Write elements [first, first + n) of flattened parameters into tensors [n].

        Args:
            runs: (name, first, tensor of any type and device).
        """
        wanted: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for name, first, target in runs:
            wanted[name].append((first, target))
        for name, pieces in wanted.items():
            law = self._laws[name]
            if law.std is None:
                for _, target in pieces:
                    target.fill_(law.value)
            else:
                self._draw(name, law, pieces)

    def _draw(self, name: str, law: _Law, pieces: list[tuple[int, Tensor]]) -> None:
        assert law.std is not None
        generator = _generator(self._seed, name)
        last = max(first + target.numel() for first, target in pieces)
        start = 0
        while start < last:
            left = law.elements - start
            length = left if left < _DRAWN + _GROUP else _DRAWN
            drawn = torch.empty(length).normal_(0.0, law.std, generator=generator)
            for first, target in pieces:
                low, high = max(first, start), min(first + target.numel(), start + length)
                if low < high:
                    target[low - first : high - first].copy_(drawn[low - start : high - start])
            start += length


def initialise(model: ReactiveTransformer, seed: int) -> None:
    """Fill all parameters in place as the module's docstring says."""
    InitialWeights(model, seed).fill((name, 0, value.data.view(-1)) for name, value in model.named_parameters())


def _constant(module: nn.Module, field: str) -> float:
    """What a parameter that is not drawn begins with."""
    if isinstance(module, nn.RMSNorm | nn.LayerNorm) and field == "weight":
        return 1.0
    return module.init if isinstance(module, ResidualGate) else 0.0


def _standard_deviations(model: ReactiveTransformer) -> Iterator[tuple[Tensor, float]]:
    """(parameter, standard deviation) of all that is drawn at random; a later entry overrides an earlier one."""
    config = model.config
    std = (5 * config.dim) ** -0.5
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight, std
        elif isinstance(module, nn.Embedding):
            yield module.weight, 1.0
        elif isinstance(module, ExpertStack | SharedExperts):
            yield module.gate_up_proj, std
    for part, layers in ((model.decoder, config.decoder_layers), (model.encoder, config.layers)):
        for module in part.modules() if part is not None else ():
            if isinstance(module, SparseQueryAttention):
                yield module.out_proj.weight, std / math.sqrt(2 * layers)
                if module.gate_proj is not None:
                    yield module.gate_proj.weight, GATE_STD
            elif isinstance(module, DenseFeedForward):
                yield module.down_proj.weight, std / math.sqrt(2 * layers)
            elif isinstance(module, ExpertStack | SharedExperts):
                yield module.down_proj, std / math.sqrt(2 * layers)


def _generator(seed: int, name: str) -> torch.Generator:
    key = hashlib.shake_256(f"rxt-init-v1|{seed}|{name}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
