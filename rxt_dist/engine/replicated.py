"""ZeRO 0: every rank holds the whole model (or its share of the experts) and all optimizer states.

DeepSpeed's own stage 0 clips by a mean of per-rank norms when experts are split, and sums bfloat16 gradients in
bfloat16. Here gradients are summed in float32 and clipped by the true global norm, by the plain engine's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.expert_parallel import is_expert
from rxt_dist.engine.optimizer import gradient_norm
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.stages.base import Stage

# Gradients are flattened into buffers of about this many elements per reduction (256 MB).
_BUCKET_ELEMENTS = 1 << 26


class ReplicatedEngine(PlainEngine):
    """The plain engine on several ranks; with expert parallelism through AutoEP's layers. See `Engine`."""

    _sums_ranks = True

    def __init__(self, stage: Stage, config: RunConfig, device: torch.device) -> None:
        groups = _split_experts(stage, config, device)
        super().__init__(stage, config, device)
        self.expert_parallel = config.parallel.expert_parallel
        self.expert_group, self.replica_group = groups
        if self.expert_group is not None:
            self.expert_rank = dist.get_rank(self.expert_group)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        experts = "AutoEP" if self.expert_parallel > 1 else "own grouped products"
        return [
            f"engine: replicated (ZeRO 0), {self.ranks.world_size} ranks",
            f"experts: {experts}, expert parallel {self.expert_parallel}",
            f"optimizer: fused AdamW, {self.train_config.precision} weights",
        ]

    def _split(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of dense parameters and of experts."""
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, master in self.masters.items():
            assert master.grad is not None
            (experts if is_expert(self.named[name]) else dense).append(master.grad)
        return dense, experts

    def _reduce_gradients(self) -> None:
        dense, experts = self._split()
        for gradients, group in ((dense, None), (experts, self.replica_group)):
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=group)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    def _grad_norm(self) -> Tensor:
        dense, experts = self._split()
        squares = gradient_norm(experts).square().to(self.device)
        if experts:
            dist.all_reduce(squares, group=self.expert_group)
        return (squares + gradient_norm(dense).square()).sqrt()

    def _owned(self, name: str, master: nn.Parameter) -> tuple[int, int]:
        group = self.replica_group if is_expert(self.named[name]) else None
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return master.numel() * rank // size, master.numel() * (rank + 1) // size


def _split_experts(stage: Stage, config: RunConfig, device: torch.device) -> tuple[Any, Any]:
    """Replace the routed blocks by AutoEP's where experts are split. Returns the groups (None: not split) of the ranks
    that split a set of experts, and of those that hold the same ones."""
    if config.parallel.expert_parallel == 1:
        return None, None
    from rxt_dist.engine.deepspeed import expert_groups, install_expert_parallel

    install_expert_parallel(stage.to(device), config)
    return expert_groups(config.parallel.expert_parallel)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        bucket.append(gradient)
        elements += gradient.numel()
        if elements >= _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
