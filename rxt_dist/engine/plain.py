"""The engine in plain torch: one process, no DeepSpeed. The oracle that every distributed topology must agree with.

bfloat16 runs hold float32 master weights; gradients of several micro-batches are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rxt_dist.config.run import OptimizerConfig, TrainConfig
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Fragment, MicroBatch, Stage, StepResult, TermTotals
from rxt_dist.engine.optimizer import adam_state, adamw, parameter_groups, set_learning_rate
from rxt_dist.engine.routing_state import RoutingState
from rxt_dist.engine.steps import StepSums, evaluate_stage, moe_blocks, set_expert_bias
from rxt_dist.losses import objective


class PlainEngine:
    """Trains a stage in this process. See `Engine`."""

    def __init__(self, stage: Stage, train: TrainConfig, optimizer: OptimizerConfig, device: torch.device) -> None:
        assert isinstance(stage, nn.Module)
        self.stage = stage.to(device)
        self.device = device
        self.ranks = Collectives(device)
        self.train_config = train
        self.clip = optimizer.clip
        self.named = {name: parameter for name, parameter in stage.model.named_parameters() if parameter.requires_grad}
        # The optimizer works on float32; where the model is bfloat16 these are copies, else the parameters themselves.
        self.masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in self.named.items()}
        if train.precision == "bfloat16":
            self.stage.to(torch.bfloat16)
        else:
            self.masters = dict(self.named)
        self.optimizer = adamw(parameter_groups(self.masters.items(), optimizer), optimizer)
        blocks = moe_blocks(stage.model)
        bias_rate = train.bias_rate if train.balancing == "bias" else None
        self.routing = RoutingState(len(blocks), blocks[0].num_experts, device, bias_rate)
        set_expert_bias(blocks, self.routing.bias_ME)

    def train_step(self, micros: Sequence[MicroBatch], lr: float) -> StepResult:
        """See `Engine.train_step`."""
        self.stage.train()
        sums = StepSums(self.stage, micros, self.ranks, self.routing)
        for micro in micros:
            output = self.stage(micro.to(self.device), self.routing.load_ME)
            objective(output.sums_T, sums.counts_T, sums.weights_T).backward()
            sums.add(output)
            self._collect_gradients(last=micro is micros[-1])
        totals, expert_counts_ME = sums.totals()
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.masters.values() if p.grad is not None])
        reason = _why_not(totals, grad_norm)
        if not reason:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip, grad_norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self._refresh_weights()
            self.routing.update(expert_counts_ME)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(not reason, reason, totals, grad_norm.item(), expert_counts_ME)

    def evaluate(self, micros: Sequence[MicroBatch]) -> TermTotals:
        """See `Engine.evaluate`."""
        return evaluate_stage(self.stage, self.stage, self.stage, micros, self.ranks, self.routing)

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """Whole parameters: this rank owns everything."""
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            if not state:
                state.update(adam_state(master, 0))
            tensors = {WEIGHT: master.detach(), FIRST_MOMENT: state["exp_avg"], SECOND_MOMENT: state["exp_avg_sq"]}
            yield Fragment(name, 0, {kind: tensor.view(-1) for kind, tensor in tensors.items()})

    def routing_state(self) -> dict[str, Tensor]:
        """See `Engine.routing_state`."""
        return self.routing.state()

    def finish_load(self, optimizer_steps: int, routing: Mapping[str, Tensor]) -> None:
        """See `Engine.finish_load`."""
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_steps), device=self.device)
        self._refresh_weights()
        self.routing.load(routing)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        return ["engine: plain torch, 1 rank", f"optimizer: fused AdamW, {self.train_config.precision} weights"]

    def close(self) -> None:
        """Nothing to free."""

    def _collect_gradients(self, *, last: bool) -> None:
        """bfloat16: add the parameters' gradients to the float32 gradients of their masters."""
        if self.train_config.precision == "float32":
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

    def _refresh_weights(self) -> None:
        if self.train_config.precision == "bfloat16":
            with torch.no_grad():
                for name, parameter in self.named.items():
                    parameter.copy_(self.masters[name])


def _why_not(totals: TermTotals, grad_norm: Tensor) -> str:
    """Why an update must not be applied; empty when all is well."""
    if not bool(torch.isfinite(totals.sums_T).all()):
        return "non-finite loss"
    return "" if bool(torch.isfinite(grad_norm)) else "non-finite gradient norm"
