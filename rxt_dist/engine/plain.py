"""The engine in plain torch: one process, no DeepSpeed. The oracle that every distributed topology must agree with.

bfloat16 runs hold float32 master weights. Gradients that must be summed, over micro-batches or ranks, are summed in
float32; those of a lone micro-batch stay bfloat16 and become float32 a few parameters at a time, while the optimizer
steps. What replicas add (ZeRO 0, replicated.py) is in three methods: `_reduce_gradients`, `_grad_norm` and `_owned`,
and in the flag `_sums_ranks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.expert_parallel import cut, is_expert, model_name
from rxt_dist.engine.inspection import first_nonfinite
from rxt_dist.engine.interface import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    WEIGHT,
    Fragment,
    NonFinite,
    StepResult,
    TermTotals,
    at_once,
)
from rxt_dist.engine.optimizer import (
    adam_state,
    adamw,
    gradient_norm,
    parameter_groups,
    row_norms,
    set_learning_rates,
)
from rxt_dist.engine.replicas import bit_sum, differing_ranks
from rxt_dist.engine.routing import RoutingState
from rxt_dist.engine.sums import StepSums, evaluate_stage
from rxt_dist.losses import objective
from rxt_dist.stages.base import MicroBatch, Stage

# Gradients are brought to float32 in portions of this many elements (64 MB), or of one parameter if that has more.
_PORTION_ELEMENTS = 1 << 24
# On a GPU (1 GB): every portion is a call of the optimizer, which looks at all parameters on the host.
_GPU_PORTION_ELEMENTS = 1 << 28

# Elements of a float32 copy that stays in the cache (4 MB).
_CACHED_ELEMENTS = 1 << 20


class PlainEngine:
    """Trains a stage in this process. See `Engine`."""

    _sums_ranks = False

    def __init__(self, stage: Stage, config: RunConfig, device: torch.device) -> None:
        train = config.train
        self.stage = stage.to(device)
        self.device = device
        self.ranks = Collectives(device)
        self.train_config = train
        self.clip = config.optimizer.clip
        self.expert_rank = 0
        self.named = {name: parameter for name, parameter in stage.model.named_parameters() if parameter.requires_grad}
        if train.precision == "bfloat16":
            self.stage.to(torch.bfloat16)
        # The optimizer works on float32: copies where the model is bfloat16, else the parameters themselves.
        self.masters = self.named
        if train.precision == "bfloat16":
            self.masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in self.named.items()}
        self._scratch = self._make_scratch()
        named = ((model_name(name), master) for name, master in self.masters.items())
        groups = parameter_groups(named, stage.model.matrices, config.optimizer, config.stage.rate_group)
        self.optimizer = adamw(groups, config.optimizer)
        self.routing = RoutingState.of(stage.model, train, device)

    def train_step(
        self, micros: Sequence[MicroBatch], rates: Mapping[str, float], before_update: Callable[[], None] = at_once
    ) -> StepResult:
        """See `Engine.train_step`."""
        self.stage.train()
        sums = StepSums(self.stage, micros, self.ranks, self.routing)
        for micro in micros:
            output = self.stage(micro.to(self.device), self.routing.load_ME)
            objective(output.sums_J, sums.counts_J, sums.weights_J).backward()
            sums.add(output)
            if len(micros) > 1 or self._sums_ranks:
                self._collect_gradients()
        self._complete_gradients(self.masters if len(micros) > 1 or self._sums_ranks else self.named)
        sums.reduce()
        self._reduce_gradients()
        grad_norm = self._grad_norm()
        totals, expert_counts_ME, (norm,) = sums.read(grad_norm)
        reason = _why_not(totals, norm)
        if not reason:
            set_learning_rates(self.optimizer, rates)
            before_update()
            self._update(grad_norm)
            self.routing.update(sums.expert_counts_ME)
        self.optimizer.zero_grad()
        self.stage.zero_grad()
        return StepResult(not reason, reason, totals, norm, expert_counts_ME)

    def evaluate(self, micros: Sequence[MicroBatch]) -> TermTotals:
        """See `Engine.evaluate`."""
        return evaluate_stage(self.stage, self.stage, self.stage, micros, self.ranks, self.routing)

    def inspect(self, micros: Sequence[MicroBatch]) -> NonFinite | None:
        """See `Engine.inspect`."""
        self.stage.train()
        sums = StepSums(self.stage, micros, self.ranks, self.routing)
        return first_nonfinite(self.stage, self.stage, micros, sums, self.routing, backward=True)

    def differing_ranks(self) -> list[int]:
        """See `Engine.differing_ranks`. Of one rank there is no copy."""
        held: tuple[list[Tensor], list[Tensor]] = [*self.routing.state().values()], []
        for name, master in self.masters.items():
            held[is_expert(self.named[name])].append(master)
        sums = [bit_sum(tensors, self.device) for tensors in held] if self.ranks.world_size > 1 else []
        return differing_ranks(self.ranks, sums, self.expert_rank)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Engine.reading`."""
        self.stage.eval()
        with torch.no_grad():
            yield

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """See `Engine.fragments`."""
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            if not state:
                state.update(adam_state(master, 0))
            whole = {WEIGHT: master.detach(), FIRST_MOMENT: state["exp_avg"], SECOND_MOMENT: state["exp_avg_sq"]}
            first, last = self._owned(name, master) if owned else (0, master.numel())
            held = {kind: tensor.view(-1)[first:last] for kind, tensor in whole.items()}
            yield from cut(name, self.named[name], self.expert_rank, first, held)

    def frozen_fragments(self) -> Iterator[Fragment]:
        """See `Engine.frozen_fragments`."""
        for name, parameter in self.stage.model.named_parameters():
            if not parameter.requires_grad:
                yield from cut(name, parameter, self.expert_rank, 0, {WEIGHT: parameter.data.view(-1)})

    def routing_state(self) -> dict[str, Tensor]:
        """See `Engine.routing_state`."""
        return self.routing.state()

    def finish_load(self, optimizer_steps: int, routing: Mapping[str, Tensor]) -> None:
        """See `Engine.finish_load`."""
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_steps), device=self.device)
        self._refresh_weights(self.named)
        self.routing.load(routing)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        return ["engine: plain torch, 1 rank", f"optimizer: fused AdamW, {self.train_config.precision} weights"]

    def close(self) -> None:
        """Nothing to free."""

    def _complete_gradients(self, named: Mapping[str, nn.Parameter]) -> None:
        """Make the gradient zero of what the step did not reach, an expert or a part that is not trained yet: counters
        and moments of the optimizer are then those of ranks that share flat tensors."""
        for parameter in named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _reduce_gradients(self) -> None:
        """Make every gradient that of the global batch; alone it is."""

    def _make_scratch(self) -> Tensor | None:
        """Room for the float32 gradients of a portion; None where the parameters are float32 themselves."""
        if self.train_config.precision == "float32":
            return None
        largest = max(parameter.numel() for parameter in self.named.values())
        total = sum(parameter.numel() for parameter in self.named.values())
        portion = _PORTION_ELEMENTS if self.device.type == "cpu" else _GPU_PORTION_ELEMENTS
        return torch.empty(max(largest, min(total, portion)), device=self.device)

    def _grad_norm(self) -> Tensor:
        """Global L2 norm of all gradients, each parameter once."""
        summed = [master.grad for master in self.masters.values() if master.grad is not None]
        if summed or self._scratch is None:
            return gradient_norm(summed)
        # The norm of a bfloat16 tensor would itself be rounded to bfloat16.
        gradients = [parameter.grad for parameter in self.named.values() if parameter.grad is not None]
        if self.device.type == "cuda":  # A few kernels for all, instead of two for each piece.
            return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
        pieces = (piece for gradient in gradients for piece in gradient.flatten().split(_CACHED_ELEMENTS))
        return gradient_norm([row_norms(self._scratch[: piece.numel()].copy_(piece)) for piece in pieces])

    def _update(self, grad_norm: Tensor) -> None:
        """Clip, step and refresh the bfloat16 weights.

        AdamW passes over parameters without a gradient, so bfloat16 gradients can be taken in portions: a float32 copy
        of them all would cost four bytes a parameter at the step's peak, and 0.3 s of fresh memory at 273M parameters.
        """
        if self._scratch is None or all(parameter.grad is None for parameter in self.named.values()):
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip, grad_norm)
            self.optimizer.step()
            self._refresh_weights(self.named)
            return
        for portion in _portions(self.named, self._scratch.numel()):
            start = 0
            for name, parameter in portion.items():
                if parameter.grad is not None:
                    room = self._scratch[start : start + parameter.numel()].view_as(parameter)
                    self.masters[name].grad = room.copy_(parameter.grad)
                    start += parameter.numel()
                    parameter.grad = None
            masters = [self.masters[name] for name in portion]
            nn.utils.clip_grads_with_norm_(masters, self.clip, grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._refresh_weights(portion)

    def _owned(self, name: str, master: nn.Parameter) -> tuple[int, int]:
        """The range of a flattened parameter that this rank saves."""
        return 0, master.numel()

    def _collect_gradients(self) -> None:
        """bfloat16: add the parameters' gradients to the float32 gradients of their masters."""
        if self._scratch is None:
            return
        for name, parameter in self.named.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def _refresh_weights(self, named: Mapping[str, nn.Parameter]) -> None:
        """bfloat16: round these parameters' masters to them."""
        if self._scratch is not None:
            for name, parameter in named.items():
                parameter.copy_(self.masters[name])


def _portions(named: Mapping[str, nn.Parameter], elements: int) -> Iterator[dict[str, nn.Parameter]]:
    """Consecutive parameters, as many at a time as fit into `elements`."""
    portion: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in named.items():
        if portion and size + parameter.numel() > elements:
            yield portion
            portion, size = {}, 0
        portion[name] = parameter
        size += parameter.numel()
    yield portion


def _why_not(totals: TermTotals, grad_norm: float) -> str:
    """Why an update must not be applied; empty when all is well."""
    if not bool(torch.isfinite(totals.sums_J).all()):
        return "non-finite loss"
    return "" if math.isfinite(grad_norm) else "non-finite gradient norm"
