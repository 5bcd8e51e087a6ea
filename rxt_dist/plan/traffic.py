"""What the ranks of a run send each other in one optimizer step, inside nodes and between them.

Collectives are taken to run as well as the hardware allows: a reduce-scatter or all-gather of n bytes over m nodes with
k members each moves n * (k - 1) / k bytes over every GPU's links inside its node, and n * (m - 1) / m in and out of
every node.
"""

from __future__ import annotations

from dataclasses import dataclass

from rxt_dist.plan.setting import FLOAT32_BYTES, Setting


@dataclass(frozen=True)
class Exchanged:
    """Bytes that the collectives of one optimizer step run over on a rank, for parameters with equally many copies.

    copies: ranks that hold the same parameters.
    gradients, weights: whole buffers, each counted once for a reduce-scatter or all-gather and twice for an all-reduce.
    """

    copies: int
    gradients: int
    weights: int


def exchanged(setting: Setting) -> tuple[Exchanged, Exchanged]:
    """What is reduced and gathered of the dense parameters, and of a rank's share of the routed experts.

    ZeRO stage 0 all-reduces float32 gradients; stage 1 reduce-scatters them and gathers the new weights; stage 2
    reduce-scatters in every micro-batch; stage 3 also gathers the weights twice in every micro-batch (forward and
    backward) and not after the step.
    """
    stage, accumulation = setting.zero, setting.accumulation
    reductions = {0: 2, 1: 1, 2: accumulation, 3: accumulation}[stage]
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage]
    dense, routed = (
        Exchanged(
            copies,
            parameters * FLOAT32_BYTES * reductions,
            (parameters + (frozen if stage == 3 else 0)) * setting.element_bytes * gathers,
        )
        for parameters, frozen, copies in setting.held
    )
    return dense, routed


def all_to_all_bytes(setting: Setting) -> float:
    """Bytes of a GPU's tokens that one optimizer step hands to the exchange between experts; of them the share
    (ep - 1) / ep leaves the GPU.

    Each token's K visited copies of D numbers go out and back, in forward and backward, and once more forward when
    layers are recomputed.
    """
    config = setting.config
    model, crossings = config.model, 6 if setting.recompute else 4
    tokens = config.train.global_batch_tokens / config.cluster.ranks
    copies_per_token = model.moe_layers * model.decoder.moe.active * crossings
    return tokens * copies_per_token * model.dim * setting.element_bytes


def traffic_per_step(setting: Setting) -> dict[str, int]:
    """Bytes that one GPU sends per optimizer step: a reduce-scatter or all-gather of n bytes over g ranks sends
    n * (g - 1) / g, an all-to-all the same."""
    parts, over = exchanged(setting), setting.expert_parallel
    return {
        "gradients": round(sum(part.gradients * (part.copies - 1) / part.copies for part in parts)),
        "weights": round(sum(part.weights * (part.copies - 1) / part.copies for part in parts)),
        "expert_all_to_all": round(all_to_all_bytes(setting) * (over - 1) / over),
    }


@dataclass(frozen=True)
class Spread:
    """How the groups of a collective lie on the nodes: each reaches `nodes` of them, with `per_node` members there."""

    nodes: int
    per_node: float

    @staticmethod
    def of(groups: list[range], gpus_per_node: int) -> Spread:
        """Of the group that reaches most nodes."""
        nodes = max(len({rank // gpus_per_node for rank in group}) for group in groups)
        return Spread(nodes, len(groups[0]) / nodes)

    @property
    def inside(self) -> float:
        """Share of a buffer that passes each GPU's links inside the node."""
        return (self.per_node - 1) / self.per_node

    @property
    def between(self) -> float:
        """Share of a buffer that leaves a node."""
        return (self.nodes - 1) / self.nodes


def step_traffic(setting: Setting) -> tuple[float, float]:
    """(bytes each GPU sends inside its node, bytes each node sends to others) per optimizer step.

    Expert-parallel groups are neighbouring ranks, so they stay inside a node as far as they fit; the copies of an
    expert are then on other nodes.
    """
    ranks, per_node = setting.config.cluster.ranks, setting.config.cluster.gpus_per_node
    over = setting.expert_parallel
    dense, routed = exchanged(setting)
    everyone = Spread.of([range(ranks)], per_node)
    copies = Spread.of([range(first, ranks, over) for first in range(over)], per_node)
    sharing = Spread.of([range(first, first + over) for first in range(0, ranks, over)], per_node)
    dense_bytes, routed_bytes = dense.gradients + dense.weights, routed.gradients + routed.weights
    tokens = all_to_all_bytes(setting)
    # Of its tokens a GPU keeps 1 / ep; the rest goes to the members on its node, and to those elsewhere.
    gpu = dense_bytes * everyone.inside + routed_bytes * copies.inside + tokens * (sharing.per_node - 1) / over
    node = (
        dense_bytes * everyone.between
        + routed_bytes * copies.between * per_node / copies.per_node
        + tokens * sharing.between * per_node
    )
    return gpu, node
