"""AdamW and its parameter groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rxt_dist.config.run import OptimizerConfig
from rxt_dist.errors import ConfigError

# As many squares are summed in float32.
_ROW_ELEMENTS = 4096


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    matrices: Collection[str],
    config: OptimizerConfig,
    rate_group: Callable[[str], str | None],
) -> list[dict[str, Any]]:
    """For each learning rate two groups: matrices, which decay, and all else; a matrix that any `no_decay` pattern
    finds does not decay. `rate` of a group names its learning rate.

    Decay pulls towards zero, which for a bias, the scale of a norm or the weight of a scalar gate means nothing.

    Args:
        named: trained parameters by their names in the model.
        matrices: names of the model's matrices, trained or not.
        rate_group: the name of each parameter's learning rate.

    Raises:
        ConfigError: for a pattern that matches no matrix (a rule that silently does nothing).
    """
    named = list(named)
    decaying = [name for name, _ in named if name in matrices]
    unmatched = [pattern for pattern in config.no_decay if not any(re.search(pattern, name) for name in decaying)]
    if unmatched:
        raise ConfigError(
            f"optimizer.no_decay has the pattern '{unmatched[0]}', which matches none of the {len(decaying)} trained "
            f"matrices (the first is '{decaying[0] if decaying else ''}'); norms, biases and scalar gates never decay. "
            f"Correct or remove the pattern."
        )
    spared = {name for name in decaying if any(re.search(pattern, name) for pattern in config.no_decay)}
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for rate in dict.fromkeys(rate_group(name) for name, _ in named):
        groups |= {(rate, True): [], (rate, False): []}
    for name, parameter in named:
        groups[rate_group(name), name in matrices and name not in spared].append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "rate": rate}
        for (rate, decays), parameters in groups.items()
        if parameters
    ]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one fused kernel for all parameters; the learning rate is set before every step."""
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0, fused=True
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Set the learning rate of every group by the name of its rate. A rate of 0 leaves its parameters as they are."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm of float32 gradients, as float32.

    On a CPU torch sums squares in float32 one after the other: over 10^6 elements a norm comes out 2e-4 too small. Rows
    are summed by themselves here, at the same speed, and the rows in float64. A GPU sums as a tree.
    """
    if not gradients or gradients[0].is_cuda:
        return nn.utils.get_total_norm(gradients)
    return torch.cat([row_norms(gradient.flatten()) for gradient in gradients]).double().norm().float()


def row_norms(flat: Tensor) -> Tensor:
    """Norms of a flat tensor's pieces of a few thousand elements each."""
    whole = flat.numel() - flat.numel() % _ROW_ELEMENTS
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW_ELEMENTS), dim=1)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:]).unsqueeze(0)])


def adam_state(parameter: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """A fresh AdamW state after `steps` steps, its step counter its own tensor.

    A counter shared by several parameters would advance once per parameter and step, and every bias correction
    would be wrong.
    """
    return {
        "step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
