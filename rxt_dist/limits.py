"""What limits a step of a run, under its own topology and under others: memory, links, arithmetic. All estimated.

A topology is a ZeRO stage with a degree of expert parallelism. Collectives are taken to run as well as the hardware
allows: a reduce-scatter or all-gather of n bytes over m nodes with k members each moves n * (k - 1) / k bytes over
every GPU's links inside its node, and n * (m - 1) / m in and out of every node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import settle_topology
from rxt_dist.plan import all_to_all_bytes, exchanged, memory_per_gpu

# Estimates that differ by less than this are equal: nothing here is known better.
_EQUAL = 1.05
_RESOURCES = {"arithmetic_s": "arithmetic", "gpu_links_s": "links inside nodes", "network_s": "network between nodes"}


@dataclass(frozen=True)
class Limits:
    """Estimates for one step under one topology. Times in seconds, memory and traffic in bytes.

    gpu_link_bytes: sent by each GPU inside its node. network_bytes: sent by each node to others.
    lower_bound_s: the longest of the three times, which a step takes where all three overlap.
    without_overlap_s: their sum, which it takes where none do.
    """

    zero: int
    expert_parallel: int
    memory_bytes: int
    fits: bool
    gpu_link_bytes: int
    network_bytes: int
    arithmetic_s: float
    gpu_links_s: float
    network_s: float
    lower_bound_s: float
    without_overlap_s: float
    limited_by: str

    @property
    def name(self) -> str:
        """As people write it."""
        return f"ZeRO {self.zero}, EP {self.expert_parallel}"


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


def step_traffic(config: RunConfig, stage: int, seq_len: int) -> tuple[float, float]:
    """(bytes each GPU sends inside its node, bytes each node sends to others) per optimizer step.

    Expert-parallel groups are neighbouring ranks, so they stay inside a node as far as they fit; the copies of an
    expert are then on other nodes.
    """
    ranks, per_node, over = config.cluster.ranks, config.cluster.gpus_per_node, config.parallel.expert_parallel
    dense, routed = exchanged(config, stage, seq_len)
    everyone = Spread.of([range(ranks)], per_node)
    copies = Spread.of([range(first, ranks, over) for first in range(over)], per_node)
    sharing = Spread.of([range(first, first + over) for first in range(0, ranks, over)], per_node)
    dense_bytes, routed_bytes = dense.gradients + dense.weights, routed.gradients + routed.weights
    tokens = all_to_all_bytes(config)
    # Of its tokens a GPU keeps 1 / ep; the rest goes to the members on its node, and to those elsewhere.
    gpu = dense_bytes * everyone.inside + routed_bytes * copies.inside + tokens * (sharing.per_node - 1) / over
    node = (
        dense_bytes * everyone.between
        + routed_bytes * copies.between * per_node / copies.per_node
        + tokens * sharing.between * per_node
    )
    return gpu, node


def limits(config: RunConfig, arithmetic_s: float, seq_len: int) -> Limits:
    """Limits of the run under its own topology. `arithmetic_s` is the same under all topologies."""
    zero, cluster = config.parallel.zero, config.cluster
    memory = memory_per_gpu(config, zero, seq_len)
    gpu_bytes, node_bytes = step_traffic(config, zero, seq_len)
    times = {
        "arithmetic_s": arithmetic_s,
        "gpu_links_s": gpu_bytes / (cluster.gpu_link_gb_s * 1e9),
        "network_s": node_bytes / (cluster.node_link_gb_s * 1e9),
    }
    longest = max(times, key=times.__getitem__)
    return Limits(
        zero=zero,
        expert_parallel=config.parallel.expert_parallel,
        memory_bytes=memory["total_estimate"],
        fits=memory["fits_estimate"],
        gpu_link_bytes=round(gpu_bytes),
        network_bytes=round(node_bytes),
        lower_bound_s=times[longest],
        without_overlap_s=sum(times.values()),
        limited_by=_RESOURCES[longest],
        **times,
    )


def plan_topologies(config: RunConfig, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Limits of the run's topology and of a few others, and a verdict: which should be faster, and why.

    Args:
        plan: what `plan_run` says of the run.
    """
    arithmetic_s, seq_len = plan["time"]["step_seconds_estimate"], plan["batch"]["seq_len"]
    own = limits(config, arithmetic_s, seq_len)
    others = [limits(other, arithmetic_s, seq_len) for other in _other_topologies(config)]
    return {
        "own_estimate": asdict(own),
        "others_estimate": [asdict(other) for other in others],
        "gpu_memory_gb": config.cluster.gpu_memory_gb,
        "verdict": verdict(own, others),
        "assumptions": [
            f"links of a GPU inside its node {config.cluster.gpu_link_gb_s:g} GB/s each way, network of a node "
            f"{config.cluster.node_link_gb_s:g} GB/s each way (cluster file, not measured)",
            "all topologies compute at the same utilisation: kernels, launches, waits of the host and experts with "
            "more tokens than others are not in it",
        ],
    }


def _other_topologies(config: RunConfig) -> Iterator[RunConfig]:
    """ZeRO 1 to 3, each without expert parallelism and with as much as a node allows."""
    if config.parallel.engine == "plain":
        return
    own = (config.parallel.zero, config.parallel.expert_parallel)
    for zero in (1, 2, 3):
        for wanted in (1, 0):
            parallel = config.parallel.model_copy(update={"zero": zero, "expert_parallel": wanted})
            other = settle_topology(config.model_copy(update={"parallel": parallel}), config.cluster.ranks)
            topology = (zero, other.parallel.expert_parallel)
            if topology != own and not (wanted == 0 and topology[1] == 1):
                yield other


def verdict(own: Limits, others: list[Limits]) -> str:
    """Which topology should be faster, in sentences: of those that fit the one with the lowest bound, and among equal
    ones the one that has least to hide."""
    fitting = [each for each in (own, *others) if each.fits]
    if not fitting:
        return "No topology fits into the memory of a GPU: recompute layers, or take fewer rows a micro-batch."
    bound = min(each.lower_bound_s for each in fitting)
    equal = [each for each in fitting if each.lower_bound_s <= bound * _EQUAL]
    best = min(equal, key=lambda each: each.without_overlap_s)
    if own in equal and own.without_overlap_s <= best.without_overlap_s * _EQUAL:
        return f"No other of these should be faster than {own.name}."
    if not own.fits:
        return f"{own.name} does not fit into the memory of a GPU; of those that do {best.name} has the lowest bound."
    return f"{best.name} should be faster than {own.name}: {_why(best, own)}."


def _why(best: Limits, own: Limits) -> str:
    parts = [
        f"{getattr(best, field):.2g} s on the {label} in place of {getattr(own, field):.2g}"
        for field, label in _RESOURCES.items()
        if abs(getattr(best, field) - getattr(own, field)) > 0.01 * own.without_overlap_s
    ]
    spent = " and ".join(parts) or "a little less traffic"
    if own.lower_bound_s > best.lower_bound_s * _EQUAL:
        return f"{spent}. The one is limited by {best.limited_by}, the other by {own.limited_by}"
    less = best.memory_bytes / own.memory_bytes
    memory = f". {own.name} takes {less:.1f} times less memory" if less > _EQUAL else ""
    return f"both are limited by {own.limited_by}, but the first has less traffic to hide, {spent}{memory}"
