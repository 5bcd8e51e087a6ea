"""The layers that AutoEP puts in place of our routed blocks, made to behave as those do.

AutoEP's own layer chooses experts by its own router, cannot return the choice, and its experts have no biases. Ours are
subclasses of its layer and of its experts; `our_layers` lets AutoEP build them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor, nn

from rxt_dist.model.experts import count_experts
from rxt_dist.model.moe import RoutedExperts, RouterGate, Routing, select_experts

# How AutoEP marks the parameters of experts, for reductions, optimizers and ZeRO-3's partitions.
_MARKS = ("allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name")


class Router(TokenChoiceTopKRouter):
    """AutoEP's router with our choice of experts; it keeps the choice until the layer that asked has ended."""

    routing: Routing | None = None

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> (weights [N, K], chosen experts [N, K], int32 tokens of each expert [E])."""
        self.routing = select_experts(self.gate(x), self.top_k, expert_bias)
        selected_NK = self.routing.selected_NK
        return self.routing.shares_NK, selected_NK, count_experts(selected_NK, self.num_experts).int()


class BiasedExperts(GroupedExperts):
    """A rank's experts with biases of their own: gate_up_bias [E, 2F] (gate half first) and down_bias [E, D].

    E counts the experts of this rank. Rows lie as AutoEP lays them out: each expert's block is filled up to a multiple
    of eight rows, and after the last block are rows of nobody, whose numbers are undefined. Filling gets a bias like
    any row of its expert; AutoEP drops its output, so its gradient is zero.
    """

    def take_biases(self, gate_up_bias_EF: Tensor, down_bias_ED: Tensor) -> None:
        """Hold copies of these experts' biases, marked as AutoEP has marked the experts' weights."""
        for name, bias in (("gate_up_bias", gate_up_bias_EF), ("down_bias", down_bias_ED)):
            parameter = nn.Parameter(bias.detach().clone(), requires_grad=self.w1.requires_grad)
            for mark in _MARKS:
                setattr(parameter, mark, getattr(self.w1, mark))
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """[X, D], int32 rows of each expert with their filling [E] -> [X, D]."""
        ends_E = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        rows_X = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        # E for the rows of nobody.
        expert_X = torch.searchsorted(ends_E, rows_X, right=True)
        gate_bias_EF, up_bias_EF = self.gate_up_bias.chunk(2, dim=-1)
        gate_XF = self._product(x, self.w1, ends_E) + _rows_of(gate_bias_EF, expert_X)
        up_XF = self._product(x, self.w3, ends_E) + _rows_of(up_bias_EF, expert_X)
        hidden_XF = apply_expert_activation(gate_XF, up_XF, self.activation)
        return self._product(hidden_XF, self.w2, ends_E) + _rows_of(self.down_bias, expert_X)

    def _product(self, rows_XD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        """Each block of rows times its expert's weight, by the kernel that AutoEP has chosen for this device."""
        if self.use_triton_grouped_mm:
            from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

            return group_gemm_triton(rows_XD, weight_EFD, ends_E, trans_b=True)
        return torch._grouped_mm(rows_XD, weight_EFD.transpose(1, 2), offs=ends_E)


def _rows_of(bias_EF: Tensor, expert_X: Tensor) -> Tensor:
    """The bias of each row's expert, zero for rows of nobody: they have a line of their own, which takes whatever
    gradient their undefined numbers come to. The gradient of an embedding is summed in float32, line by line."""
    return F.embedding(expert_X, F.pad(bias_EF, (0, 0, 0, 1)))


class RoutedLayer(AutoEPMoELayer):
    """AutoEP's layer as `RoutedExperts` behaves: it returns its routing beside its output, and experts have biases.

    The layer's own way to return logits would compute them a second time, and experts would be chosen from those again.
    """

    def __init__(self, spec: Any, source_module: RoutedExperts, **how: Any) -> None:
        """See `AutoEPMoELayer`; `source_module` is the block that it replaces."""
        super().__init__(spec, source_module, **how)
        self.router.__class__, self.router.gate.__class__ = Router, RouterGate
        self.return_router_logits = False
        self.num_experts_per_tok = self.top_k
        source = source_module.experts
        if source.gate_up_bias is not None and source.down_bias is not None:
            first = self.ep_rank * self.num_local_experts
            mine = slice(first, first + self.num_local_experts)
            self.experts.__class__ = BiasedExperts
            self.experts.take_biases(source.gate_up_bias[mine], source.down_bias[mine])

    def set_choice_bias(self, bias_E: Tensor | None) -> None:
        """See `RoutedExperts.set_choice_bias`."""
        self.expert_bias = bias_E

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> ([B, T, D], routing of its B * T tokens)."""
        try:
            return super().forward(hidden_states)
        finally:
            # Recomputation may leave a layer early, and its graph must not live on in the router.
            self.router.routing = None

    def _finalize_output(self, *arguments: Any) -> tuple[Tensor, Routing]:
        return super()._finalize_output(*arguments), self.router.routing


@contextmanager
def our_layers() -> Iterator[None]:
    """While the block lasts, AutoEP builds `RoutedLayer`; it looks its class up by name for each block."""
    auto_ep_layer.AutoEPMoELayer = RoutedLayer
    try:
        yield
    finally:
        auto_ep_layer.AutoEPMoELayer = AutoEPMoELayer
