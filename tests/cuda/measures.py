"""How far two results are apart, and the tolerances of tests/cuda.

Norms of differences over norms, not single elements: kernels sum in other orders, and one element near zero says
nothing. NaN never passes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# float32 against float32, without TF32.
FLOAT32 = 2e-5
# bfloat16 rounds at 2^-9 = 0.2 %; a result of some roundings in a row.
BFLOAT16 = 1e-2
# A whole step in bfloat16, about three times what it is off on a CPU. Rounded hidden states also send some tokens to
# other experts: that moves single gradients far (measured up to 0.19), all of them together little (0.009).
BFLOAT16_LOSS = 5e-3
BFLOAT16_ALL_GRADIENTS = 3e-2
BFLOAT16_ONE_GRADIENT = 5e-1
BFLOAT16_SAME_EXPERTS = 5e-2


def tolerance(dtype: torch.dtype) -> float:
    """Of one operation."""
    return FLOAT32 if dtype == torch.float32 else BFLOAT16


def distance(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """|a - b| / |b|, or over another scale; where that is zero, |a - b|."""
    mine, theirs = actual.detach().cpu().double(), expected.detach().cpu().double()
    return (mine - theirs).norm().item() / (scale or theirs.norm().item() or 1.0)


def assert_near(
    names: Iterable[str],
    actual: Iterable[Tensor],
    expected: Iterable[Tensor],
    allowed: float,
    zero_below: float = 0.0,
) -> None:
    """Every pair is at most `allowed` apart; says of all how far they are.

    zero_below: an expected tensor whose norm is less than this share of the largest one's is zero but for rounding, as
        the gradient of a softmax over one element is; it is measured against the largest.
    """
    pairs = {name: pair for name, *pair in zip(names, actual, expected, strict=True)}
    norms = {name: theirs.detach().cpu().double().norm().item() for name, (_, theirs) in pairs.items()}
    largest = max(norms.values())
    scales = {name: largest if norm < zero_below * largest else norm for name, norm in norms.items()}
    off = {name: distance(mine, theirs, scales[name]) for name, (mine, theirs) in pairs.items()}
    wrong = {name: value for name, value in off.items() if not value <= allowed}
    assert not wrong, f"allowed {allowed:.0e}, but {wrong}; of all {off}"
