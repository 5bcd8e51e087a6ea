"""The norm against torch's, rotary positions against complex numbers in float64."""

from __future__ import annotations

import cmath

import pytest
import torch

from rxt_dist.model.norm_rope import RMSNorm, rotary
from tests.tiny import model_config


@pytest.mark.parametrize("eps", [1e-6, 0.3, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_norm_and_its_gradients_are_torchs(eps: float | None, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = RMSNorm(24, eps=eps).to(dtype), torch.nn.RMSNorm(24, eps=eps).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24, generator=generator))
        theirs.weight.copy_(ours.weight)
    if eps is None:
        theirs.eps = torch.finfo(dtype).eps
    x = torch.randn(3, 7, 24, generator=generator).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    direction = torch.randn(3, 7, 24, generator=generator).to(dtype)
    actual, expected = ours(x), theirs(exact)
    mine = torch.autograd.grad(actual, [x, ours.weight], direction)
    wanted = torch.autograd.grad(expected, [exact, theirs.weight], direction.double())
    for one, other in zip((actual, *mine), (expected, *wanted), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    RMSNorm(4, eps=1e-6)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_rotation_is_a_complex_product() -> None:
    config = model_config("rope_base=100000")
    positions_BT = torch.tensor([[0, 1, 2, 4095, 8191]])
    size = config.head_dim
    x_BTHd = torch.randn(2, 5, 3, size)
    rotated = rotary(config, positions_BT)(x_BTHd)
    for time, position in enumerate(positions_BT[0].tolist()):
        for pair in range(size // 2):
            turn = cmath.exp(1j * position * config.rope_base ** (-2 * pair / size))
            expected = torch.view_as_complex(x_BTHd[:, time, :, 2 * pair : 2 * pair + 2].double().contiguous()) * turn
            actual = torch.view_as_complex(rotated[:, time, :, 2 * pair : 2 * pair + 2].double().contiguous())
            # A float32 angle of 8,191 radians is off by up to 0.0005.
            assert (actual - expected).abs().max() < 1e-3


def test_rotation_keeps_the_type_and_turns_gradients_back() -> None:
    config = model_config()
    rotate = rotary(config, torch.arange(6).unsqueeze(0))
    x = torch.randn(2, 6, 2, config.head_dim, requires_grad=True)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(rotate(x), x, direction)
    # A rotation is orthogonal: turning its gradient forward again gives back the direction.
    torch.testing.assert_close(rotate(gradient), direction)
    assert rotate(x.bfloat16()).dtype == torch.bfloat16


def test_bfloat16_angles_are_only_for_weights_that_were_trained_with_them() -> None:
    positions_BT = torch.tensor([[5000]])
    exact = rotary(model_config("rope_base=100000"), positions_BT).turn
    coarse = rotary(model_config("rope_base=100000", "rope_angles=bfloat16"), positions_BT).turn
    assert (exact - coarse).abs().max() > 0.1
