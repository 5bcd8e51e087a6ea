"""The matrix products of the routed experts: rows sorted by expert, one product per expert, nothing dropped.

Two paths with the same result. On CUDA in half precision all experts are one grouped product. Elsewhere a loop over
experts runs inside one autograd function: it writes each expert's weight gradient in place into one stacked tensor
(autograd through a loop would build E of them and stack them again) and keeps only what backward needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import MoEConfig


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair goes: R = N * K rows, sorted by expert.

    order_R: index into the flattened [N * K] choices for each sorted row.
    inverse_R: position among the sorted rows for each flattened choice.
    counts_E: rows of each expert.
    choices: K.
    """

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor
    choices: int

    @staticmethod
    def of(selected_NK: Tensor, experts: int) -> Dispatch:
        """Sort the choices by expert, stable in token order."""
        flat = selected_NK.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return Dispatch(order, inverse, count_experts(flat, experts), selected_NK.shape[-1])

    @property
    def tokens(self) -> Tensor:
        """The token of each sorted row, int64 [R]."""
        return self.order_R // self.choices


def count_experts(selected: Tensor, experts: int) -> Tensor:
    """Histogram int64 [E] of expert indices of any shape, without the host sync of `bincount`."""
    flat = selected.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _expert_slices(counts_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    slices, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


class _LoopedExperts(torch.autograd.Function):
    """y = sum_k a_k FF_k(x) with a Python loop over experts; see the module's docstring for why not autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        dispatch: Dispatch,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        gate_up_bias_EF: Tensor | None,
        down_bias_ED: Tensor | None,
    ) -> Tensor:
        slices = _expert_slices(dispatch.counts_E)
        rows_RD = x_ND[dispatch.tokens]
        hidden_RF = rows_RD.new_empty(rows_RD.shape[0], gate_up_EFD.shape[1])
        for expert, rows in slices:
            if gate_up_bias_EF is None:
                torch.mm(rows_RD[rows], gate_up_EFD[expert].t(), out=hidden_RF[rows])
            else:
                torch.addmm(gate_up_bias_EF[expert], rows_RD[rows], gate_up_EFD[expert].t(), out=hidden_RF[rows])
        act_RF = _swiglu(hidden_RF)
        out_RD = torch.empty_like(rows_RD)
        for expert, rows in slices:
            if down_bias_ED is None:
                torch.mm(act_RF[rows], down_EDF[expert].t(), out=out_RD[rows])
            else:
                torch.addmm(down_bias_ED[expert], act_RF[rows], down_EDF[expert].t(), out=out_RD[rows])
        ctx.save_for_backward(
            x_ND, weights_NK, hidden_RF, gate_up_EFD, down_EDF, gate_up_bias_EF, down_bias_ED, *_tensors(dispatch)
        )
        ctx.slices = slices
        return combine(out_RD, weights_NK, dispatch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, hidden_RF, gate_up_EFD, down_EDF, gate_up_bias, down_bias, order, inverse, counts = (
            ctx.saved_tensors
        )
        dispatch = Dispatch(order, inverse, counts, weights_NK.shape[1])
        tokens_R = dispatch.tokens
        grad_out_RD = grads[0][tokens_R]
        row_weights_R1 = weights_NK.flatten()[order].unsqueeze(1).to(x_ND.dtype)
        act_RF = _swiglu(hidden_RF)

        # d act before the routing weight: its product with act is also the gradient of that weight.
        unweighted_RF = torch.empty_like(act_RF)
        for expert, rows in ctx.slices:
            torch.mm(grad_out_RD[rows], down_EDF[expert], out=unweighted_RF[rows])
        grad_weights_R = (unweighted_RF * act_RF).sum(-1, dtype=torch.float32)
        grad_out_weighted_RD = grad_out_RD * row_weights_R1
        grad_down = torch.empty_like(down_EDF)
        grad_down_bias = None if down_bias is None else torch.zeros_like(down_bias)
        for expert, rows in ctx.slices:
            torch.mm(grad_out_weighted_RD[rows].t(), act_RF[rows], out=grad_down[expert])
            if grad_down_bias is not None:
                grad_down_bias[expert] = grad_out_weighted_RD[rows].sum(0)
                grad_weights_R[rows] += grad_out_RD[rows].float() @ down_bias[expert].float()
        del grad_out_weighted_RD, act_RF

        grad_hidden_RF = _swiglu_backward(unweighted_RF.mul_(row_weights_R1), hidden_RF)
        rows_RD = x_ND[tokens_R]
        grad_gate_up = torch.empty_like(gate_up_EFD)
        grad_gate_up_bias = None if gate_up_bias is None else torch.zeros_like(gate_up_bias)
        grad_rows_RD = grad_out_RD
        for expert, rows in ctx.slices:
            torch.mm(grad_hidden_RF[rows].t(), rows_RD[rows], out=grad_gate_up[expert])
            torch.mm(grad_hidden_RF[rows], gate_up_EFD[expert], out=grad_rows_RD[rows])
            if grad_gate_up_bias is not None:
                grad_gate_up_bias[expert] = grad_hidden_RF[rows].sum(0)
        idle = (counts == 0).nonzero().flatten().tolist()
        for expert in idle:
            grad_gate_up[expert].zero_()
            grad_down[expert].zero_()
        grad_x = grad_rows_RD[inverse].view(*weights_NK.shape, -1).sum(1)
        grad_weights = grad_weights_R[inverse].view_as(weights_NK).to(weights_NK.dtype)
        return grad_x, grad_weights, None, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


def _tensors(dispatch: Dispatch) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.order_R, dispatch.inverse_R, dispatch.counts_E


def _swiglu(hidden_RF: Tensor) -> Tensor:
    gate, up = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(grad_act: Tensor, hidden_RF: Tensor) -> Tensor:
    gate, up = hidden_RF.chunk(2, dim=-1)
    grad = torch.empty_like(hidden_RF)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(grad_act, F.silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_act * up, gate))
    return grad


def combine(rows_RD: Tensor, weights_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """Weighted sum of each token's K expert outputs: sorted rows [R, D] -> [N, D]."""
    choices_NKD = rows_RD[dispatch.inverse_R].view(*weights_NK.shape, -1)
    return torch.bmm(weights_NK.to(rows_RD.dtype).unsqueeze(1), choices_NKD).squeeze(1)


class ExpertStack(nn.Module):
    """Weights of all routed experts, stacked: gate_up_proj [E, 2F, D] (gate half first), down_proj [E, D, F].

    With bias mode 'local' also gate_up_bias [E, 2F] and down_bias [E, D]. Names and shapes are those that the
    engine's expert parallelism looks for.
    """

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(moe.experts, 2 * moe.hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(moe.experts, dim, moe.hidden))
        local = moe.bias == "local"
        self.gate_up_bias = nn.Parameter(torch.zeros(moe.experts, 2 * moe.hidden)) if local else None
        self.down_bias = nn.Parameter(torch.zeros(moe.experts, dim)) if local else None

    def forward(self, x_ND: Tensor, selected_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """sum_k weights_k * FF_selected_k(x): [N, D] -> [N, D]; no expert has a capacity, no token is dropped."""
        dispatch = Dispatch.of(selected_NK, self.gate_up_proj.shape[0])
        if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
            return self._grouped(x_ND, weights_NK, dispatch)
        return _LoopedExperts.apply(
            x_ND, weights_NK, dispatch, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias
        )

    def _grouped(self, x_ND: Tensor, weights_NK: Tensor, dispatch: Dispatch) -> Tensor:
        ends_E = dispatch.counts_E.cumsum(0).to(torch.int32)
        hidden_RF = torch._grouped_mm(x_ND[dispatch.tokens], self.gate_up_proj.transpose(1, 2), offs=ends_E)
        if self.gate_up_bias is not None:
            hidden_RF = hidden_RF + self._per_row(self.gate_up_bias, dispatch)
        out_RD = torch._grouped_mm(_swiglu(hidden_RF), self.down_proj.transpose(1, 2), offs=ends_E)
        if self.down_bias is not None:
            out_RD = out_RD + self._per_row(self.down_bias, dispatch)
        return combine(out_RD, weights_NK, dispatch)

    @staticmethod
    def _per_row(bias_EF: Tensor, dispatch: Dispatch) -> Tensor:
        return bias_EF.repeat_interleave(dispatch.counts_E, dim=0, output_size=dispatch.order_R.numel())
