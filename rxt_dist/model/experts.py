"""The matrix products of the routed experts: rows sorted by expert, one product per expert, nothing dropped.

Two paths with the same result. On CUDA in bfloat16 all experts are one grouped product. Elsewhere a loop over
experts runs inside one autograd function: it writes each expert's weight gradient in place into one stacked tensor
(autograd through a loop would build E of them and stack them again) and keeps only what backward needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import MoEConfig
from rxt_dist.model.fused import Chain, swiglu_formula, weighted_swiglu


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair goes: R = N * K rows, sorted by expert.

    order_X: index into the flattened [N * K] choices for each sorted row.
    inverse_X: position among the sorted rows for each flattened choice.
    counts_E: rows of each expert.
    choices: K.
    """

    order_X: Tensor
    inverse_X: Tensor
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
        """The token of each sorted row, int64 [X]."""
        return self.order_X // self.choices


def count_experts(selected: Tensor, experts: int) -> Tensor:
    """Histogram int64 [E] of expert indices of any shape, without the host sync of `bincount`."""
    flat = selected.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


class _Layout(NamedTuple):
    """Rows of a buffer in which every expert owns a block, its length rounded up to `_alignment`.

    blocks: (expert, its rows) for every expert that has any. position_X: the row of each flattened choice.
    source_X: the token of each row. weight_X1: its routing weight; 0 in rows that only fill a block, which therefore
    add nothing to any gradient.
    """

    blocks: list[tuple[int, slice]]
    position_X: Tensor
    source_X: Tensor
    weight_X1: Tensor

    @staticmethod
    def of(dispatch: Dispatch, weights_NK: Tensor, dtype: torch.dtype) -> _Layout:
        alignment = _alignment(dtype)
        blocks, shifts, end, filled = [], [], 0, 0
        for expert, count in enumerate(dispatch.counts_E.tolist()):
            # How far this expert's rows move from their place among the sorted choices.
            shifts.append(end - filled)
            length = -(-count // alignment) * alignment
            if count:
                blocks.append((expert, slice(end, end + length)))
            end += length
            filled += count
        device = weights_NK.device
        shift_X = torch.tensor(shifts, device=device).repeat_interleave(dispatch.counts_E)
        position_X = dispatch.inverse_X + shift_X[dispatch.inverse_X]
        source_X = torch.zeros(end, dtype=torch.int64, device=device)
        source_X[position_X] = torch.arange(weights_NK.shape[0], device=device).repeat_interleave(dispatch.choices)
        weight_X1 = torch.zeros(end, 1, dtype=dtype, device=device)
        weight_X1[position_X, 0] = weights_NK.detach().flatten().to(dtype)
        return _Layout(blocks, position_X, source_X, weight_X1)


def _alignment(dtype: torch.dtype) -> int:
    """Row counts that matrix products see are multiples of this.

    oneDNN compiles a bfloat16 product for every new shape, 0.7 ms and half a megabyte each: with free row counts that
    took 2.8 ms for three products of 256 x 1024 and about 100 rows, with multiples of 16 it takes 0.8 ms.
    """
    return 16 if dtype == torch.bfloat16 else 1


class _LoopedExperts(torch.autograd.Function):
    """y = sum_k a_k FF_k(x) with a Python loop over experts; see the module's docstring for why not autograd.

    All that one expert needs is computed at once, in pieces that stay in the cache: whole-layer temporaries would
    each be fresh memory, which the system hands out at 2-4 GB/s (measured) against 40 GB/s for memory in use.
    """

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
        layout = _Layout.of(dispatch, weights_NK, x_ND.dtype)
        out_XD = x_ND.new_empty(layout.source_X.shape[0], x_ND.shape[1])
        hidden_XF = x_ND.new_empty(layout.source_X.shape[0], gate_up_EFD.shape[1])
        for expert, rows in layout.blocks:
            x_CD, hidden_CF = x_ND.index_select(0, layout.source_X[rows]), hidden_XF[rows]
            _linear(x_CD, gate_up_EFD[expert], _at(gate_up_bias_EF, expert), out=hidden_CF)
            _linear(swiglu_formula(hidden_CF), down_EDF[expert], _at(down_bias_ED, expert), out=out_XD[rows])
        ctx.save_for_backward(
            x_ND, weights_NK, hidden_XF, gate_up_EFD, down_EDF, gate_up_bias_EF, down_bias_ED, *layout[1:]
        )
        ctx.blocks = layout.blocks
        return _sum_choices(out_XD, layout.position_X.view_as(weights_NK), weights_NK.to(out_XD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, hidden_XF, gate_up_EFD, down_EDF, gate_up_bias, down_bias, position, source, weight = (
            ctx.saved_tensors
        )
        (grad_ND,) = grads
        grad_rows_XD = hidden_XF.new_empty(hidden_XF.shape[0], x_ND.shape[1])
        grad_weights_X = hidden_XF.new_empty(hidden_XF.shape[0], dtype=torch.float32)
        grad_gate_up, grad_down = torch.empty_like(gate_up_EFD), torch.empty_like(down_EDF)
        grad_gate_up_bias = None if gate_up_bias is None else torch.empty_like(gate_up_bias)
        grad_down_bias = None if down_bias is None else torch.empty_like(down_bias)
        for expert, rows in ctx.blocks:
            hidden_CF, weight_C1, source_C = hidden_XF[rows], weight[rows], source[rows]
            gate_CF, up_CF = hidden_CF.chunk(2, dim=-1)
            silu_CF = F.silu(gate_CF)
            act_CF = silu_CF * up_CF
            grad_CD = grad_ND.index_select(0, source_C)
            # d act before the routing weight: its product with act is also the gradient of that weight.
            grad_act_CF = grad_CD @ down_EDF[expert]
            grad_weights_C = (grad_act_CF * act_CF).sum(-1, dtype=torch.float32)
            if down_bias is not None:
                grad_weights_C += grad_CD.float() @ down_bias[expert].float()
            grad_weights_X[rows] = grad_weights_C
            grad_CD *= weight_C1
            grad_act_CF *= weight_C1
            torch.mm(grad_CD.t(), act_CF, out=grad_down[expert])
            grad_hidden_CF = torch.empty_like(hidden_CF)
            grad_gate_CF, grad_up_CF = grad_hidden_CF.chunk(2, dim=-1)
            torch.mul(grad_act_CF, silu_CF, out=grad_up_CF)
            torch.ops.aten.silu_backward.grad_input(grad_act_CF.mul_(up_CF), gate_CF, grad_input=grad_gate_CF)
            torch.mm(grad_hidden_CF.t(), x_ND.index_select(0, source_C), out=grad_gate_up[expert])
            torch.mm(grad_hidden_CF, gate_up_EFD[expert], out=grad_rows_XD[rows])
            if grad_gate_up_bias is not None and grad_down_bias is not None:
                torch.sum(grad_hidden_CF, 0, out=grad_gate_up_bias[expert])
                torch.sum(grad_CD, 0, out=grad_down_bias[expert])
        _zero_idle((grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias), [expert for expert, _ in ctx.blocks])
        grad_x = _sum_choices(grad_rows_XD, position.view_as(weights_NK), None)
        grad_weights = grad_weights_X[position].view_as(weights_NK).to(weights_NK.dtype)
        return grad_x, grad_weights, None, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


def _at(stack: Tensor | None, expert: int) -> Tensor | None:
    return None if stack is None else stack[expert]


def _linear(x_CD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, *, out: Tensor) -> None:
    if bias_F is None:
        torch.mm(x_CD, weight_FD.t(), out=out)
    else:
        torch.addmm(bias_F, x_CD, weight_FD.t(), out=out)


def _zero_idle(gradients: Sequence[Tensor | None], busy: list[int]) -> None:
    """Zero what the loop over busy experts did not write."""
    for gradient in gradients:
        if gradient is not None:
            for expert in set(range(gradient.shape[0])).difference(busy):
                gradient[expert].zero_()


def _bag(rows_XD: Tensor, position_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    # An embedding bag sums while it gathers. With 4,096 tokens, K = 10 and D = 512 it takes 3 ms on CPU; gathering
    # [N, K, D] first and summing it then takes 75 ms.
    return F.embedding_bag(position_NK, rows_XD, mode="sum", per_sample_weights=weights_NK)


def _bag_formula(rows_XD: Tensor, position_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    rows_NKD = rows_XD[position_NK].float()
    if weights_NK is not None:
        rows_NKD = rows_NKD * weights_NK.unsqueeze(-1)
    return rows_NKD.sum(1).to(rows_XD.dtype)


# Sum of each token's K rows, weighted where weights are given: [X, D] -> [N, D].
_sum_choices = Chain(_bag_formula, _bag)


class _GatheredRows(torch.autograd.Function):
    """The token of every sorted row: [N, D] -> [X, D].

    Its gradient is a sum over each token's K rows, gathered: what autograd would do, adding each row to its token,
    takes turns on a device in an order that is another one in every run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, tokens_X: Tensor, position_NK: Tensor) -> Tensor:
        ctx.save_for_backward(position_NK)
        return x_ND.index_select(0, tokens_X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (position_NK,) = ctx.saved_tensors
        return _sum_choices(grads[0], position_NK, None), None, None


class _SummedRows(torch.autograd.Function):
    """The sum of every token's K rows, the other way round: [X, D] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, tokens_X: Tensor, position_NK: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_X)
        return _sum_choices(rows_XD, position_NK, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tokens_X,) = ctx.saved_tensors
        return grads[0].index_select(0, tokens_X), None, None


# Rows times their expert's weight: (sorted rows [X, K], weights [E, N, K], int32 ends of experts' rows [E]) -> [X, N].
GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_product(rows_XK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """torch's grouped product, which has a kernel from Hopper on and is a loop over experts before."""
    product: Tensor = torch._grouped_mm(rows_XK, weight_ENK.transpose(1, 2), offs=ends_E)
    return product


_grouped_product: GroupedProduct = torch_product


def set_grouped_product(product: GroupedProduct) -> None:
    """What computes the experts of bfloat16 models on CUDA in this process; chosen by the engine for its device."""
    global _grouped_product
    _grouped_product = product


class ExpertStack(nn.Module):
    """Weights of all routed experts, stacked: gate_up_proj [E, 2F, D] (gate half first), down_proj [E, D, F].

    With bias mode 'local' also gate_up_bias [E, 2F] and down_bias [E, D]. Names and shapes are those that the
    engine's expert parallelism looks for.
    """

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts = moe.experts
        self.gate_up_proj = nn.Parameter(torch.empty(moe.experts, 2 * moe.hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(moe.experts, dim, moe.hidden))
        local = moe.bias == "local"
        self.gate_up_bias = nn.Parameter(torch.zeros(moe.experts, 2 * moe.hidden)) if local else None
        self.down_bias = nn.Parameter(torch.zeros(moe.experts, dim)) if local else None

    def forward(self, x_ND: Tensor, selected_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """sum_k weights_k * FF_selected_k(x): [N, D] -> [N, D]; no expert has a capacity, no token is dropped."""
        dispatch = Dispatch.of(selected_NK, self.num_experts)
        if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
            return self._grouped(x_ND, weights_NK, selected_NK, dispatch)
        return _LoopedExperts.apply(
            x_ND, weights_NK, dispatch, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias
        )

    def _grouped(self, x_ND: Tensor, weights_NK: Tensor, selected_NK: Tensor, dispatch: Dispatch) -> Tensor:
        ends_E = dispatch.counts_E.cumsum(0).to(torch.int32)
        position_NK = dispatch.inverse_X.view_as(selected_NK)
        rows_XD = _GatheredRows.apply(x_ND, dispatch.tokens, position_NK)
        hidden_XF = _grouped_product(rows_XD, self.gate_up_proj, ends_E)
        if self.gate_up_bias is not None:
            # As a product with ones: its gradient then is a sum over the expert's rows in a fixed order, by the same
            # kernel. Eight columns, since products want rows of 16 bytes.
            bias_EF8 = F.pad(self.gate_up_bias.unsqueeze(-1), (0, 7))
            hidden_XF = hidden_XF + _grouped_product(rows_XD.new_ones(rows_XD.shape[0], 8), bias_EF8, ends_E)
        # The routing weight multiplies before the down-projection, which is linear: F numbers a row instead of D, and
        # the products' results need not be kept for the gradient of the weights.
        act_XF = weighted_swiglu(hidden_XF, weights_NK.flatten().index_select(0, dispatch.order_X))
        out_XD = _grouped_product(act_XF, self.down_proj, ends_E)
        out_ND = _SummedRows.apply(out_XD, dispatch.tokens, position_NK)
        if self.down_bias is None:
            return out_ND
        shares_NE = weights_NK.new_zeros(x_ND.shape[0], self.num_experts).scatter(1, selected_NK, weights_NK)
        return out_ND + shares_NE.to(out_ND.dtype) @ self.down_bias
