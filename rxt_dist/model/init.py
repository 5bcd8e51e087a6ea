"""Initial weights: every choice that differs from the published systems, and why, in this one place.

Kept: norms 1, biases 0, residual memory gates at their configured start (3.0), and the embedding N(0, 1). The last is
no matter of taste here: pre-training adds noise of an absolute level to the encoder's residual stream, and a
stream that starts at 1 / sqrt(D) drowns in it (with such an embedding the demo model never learnt to read its memory).

Different:

- Linear layers and experts N(0, 1 / (5 D)) (0.02 at width 512), and the projections that write to the residual stream
  divided by sqrt(2 * layers) (Radford et al. 2019), so that the stream's variance does not grow with depth.
- Attention gates N(0, 0.02^2): published code draws them from N(1, 0.01), which saturates 84 % of the gates at start.

Each parameter has a generator of its own, keyed by (seed, name): the same weights whatever else is built, and in
whatever order or on whatever rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rxt_dist.model.attention import SparseQueryAttention
from rxt_dist.model.experts import ExpertStack
from rxt_dist.model.feedforward import DenseFeedForward
from rxt_dist.model.memory import ResidualGate
from rxt_dist.model.moe import SharedExperts
from rxt_dist.model.reactive import ReactiveTransformer

GATE_STD = 0.02


def initialise(model: ReactiveTransformer, seed: int) -> None:
    """Fill all parameters in place as the module's docstring says."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stds = {id(parameter): std for parameter, std in _standard_deviations(model)}
    with torch.no_grad():
        for module in model.modules():
            for field, parameter in module.named_parameters(recurse=False):
                std = stds.get(id(parameter))
                if std is not None:
                    parameter.normal_(0.0, std, generator=_generator(seed, names[id(parameter)]))
                elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and field == "weight":
                    parameter.fill_(1.0)
                elif isinstance(module, ResidualGate):
                    parameter.fill_(module.init)
                else:
                    parameter.zero_()


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
