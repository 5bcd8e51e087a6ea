"""All valid settings of a run (ZeRO stage, expert parallelism, micro-batch, recomputation): what fits, and which should
be fastest. All estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rxt_dist.config.validate import divisors, expert_parallel_sizes
from rxt_dist.plan.memory import USABLE, Memory, memory_per_gpu
from rxt_dist.plan.setting import Setting
from rxt_dist.plan.traffic import step_traffic

# Estimates that differ by less than this are equal: nothing here is known better.
_EQUAL = 1.05
_RESOURCES = {"arithmetic_s": "arithmetic", "gpu_links_s": "links inside nodes", "network_s": "network between nodes"}
# What recomputation repeats: the forward pass of the layers, a third of their operations, and not that of the heads.
_HEADS = ("lm_head", "mlm_head")


@dataclass(frozen=True)
class Estimate:
    """Estimates for one step under one setting. Times in seconds, memory and traffic in bytes.

    gpu_link_bytes: sent by each GPU inside its node. network_bytes: sent by each node to others.
    lower_bound_s: the longest of the three times, which a step takes where all three overlap.
    without_overlap_s: their sum, which it takes where none do.
    refused: why it cannot run; empty where it fits.
    """

    zero: int
    expert_parallel: int
    micro_rows: int
    recompute: bool
    accumulation: int
    memory_bytes: int
    refused: str
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
        kept = "recomputed" if self.recompute else "kept"
        return f"ZeRO {self.zero}, EP {self.expert_parallel}, {self.micro_rows} rows, {kept}"

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """As of `Setting`."""
        return self.zero, self.expert_parallel, self.micro_rows, self.recompute


def estimate(setting: Setting, arithmetic_s: float) -> Estimate:
    """What a step takes under a setting.

    Args:
        arithmetic_s: what its arithmetic takes, recomputation included.
    """
    cluster, memory = setting.config.cluster, memory_per_gpu(setting)
    gpu_bytes, node_bytes = step_traffic(setting)
    gpu_links_s, network_s = gpu_bytes / (cluster.gpu_link_gb_s * 1e9), node_bytes / (cluster.node_link_gb_s * 1e9)
    times = {"arithmetic_s": arithmetic_s, "gpu_links_s": gpu_links_s, "network_s": network_s}
    longest = max(times, key=times.__getitem__)
    return Estimate(
        *setting.key,
        accumulation=setting.accumulation,
        memory_bytes=memory.total,
        refused=_refusal(memory, cluster.gpu_memory_gb),
        gpu_link_bytes=round(gpu_bytes),
        network_bytes=round(node_bytes),
        arithmetic_s=arithmetic_s,
        gpu_links_s=gpu_links_s,
        network_s=network_s,
        lower_bound_s=times[longest],
        without_overlap_s=sum(times.values()),
        limited_by=_RESOURCES[longest],
    )


def _refusal(memory: Memory, gpu_memory_gb: float) -> str:
    """Empty, or how much too large it is and what takes most."""
    if memory.fits(gpu_memory_gb):
        return ""
    largest = sorted(asdict(memory).items(), key=lambda item: -item[1])[:2]
    most = " and ".join(f"{value / 1e9:.3g} of it {name}" for name, value in largest)
    usable = gpu_memory_gb * USABLE
    return f"takes {memory.total / 1e9:.3g} GB where {usable:.3g} of {gpu_memory_gb:g} can be used, {most}"


def valid_settings(own: Setting) -> Iterator[Setting]:
    """Every setting that the run could have with its ranks, its own first.

    Experts are split inside a node only, unless the run's own setting goes further. Engine 'plain' divides nothing.
    """
    yield own
    config = own.config
    plain = config.parallel.engine == "plain"
    for zero in (config.parallel.zero,) if plain else (0, 1, 2, 3):
        for over in expert_parallel_sizes(config, config.cluster.ranks):
            for rows in _micro_batches(own):
                for recompute in (False, True):
                    other = own.with_(zero=zero, expert_parallel=over, micro_rows=rows, recompute=recompute)
                    if other.key != own.key:
                        yield other


def _micro_batches(own: Setting) -> list[int]:
    """Rows of a micro-batch that divide every batch of the run, those of a ramp too."""
    train, ranks = own.config.train, own.config.cluster.ranks
    tokens = [train.global_batch_tokens]
    if train.ramp is not None:
        tokens += [train.ramp.start_tokens, train.ramp.increment_tokens]
    if own.config.data.seq_len is None or any(portion % (own.row_tokens * ranks) for portion in tokens):
        return [own.micro_rows]
    return divisors(math.gcd(*tokens) // (own.row_tokens * ranks))


def plan_settings(own: Setting, step_s: float, flops: Mapping[str, int]) -> dict[str, Any]:
    """All settings of a run, best first, those that do not fit apart; and which should be faster than its own, and why.

    Args:
        step_s: what the arithmetic of the run's own setting takes.
        flops: operations of a step by part.
    """
    recomputed = sum(count for part, count in flops.items() if part not in _HEADS) / 3
    plain = sum(flops.values())
    per_flop = step_s / (plain + recomputed * own.recompute)
    found = [estimate(each, per_flop * (plain + recomputed * each.recompute)) for each in valid_settings(own)]
    first, ordered = found[0], ranked([each for each in found if not each.refused])
    refused = [each for each in found if each.refused]
    place = [each.key for each in ordered].index(first.key) + 1 if not first.refused else None
    return {
        "own_estimate": asdict(first),
        "own_rank": place,
        "ranked_estimate": [asdict(each) for each in ordered],
        "refused_estimate": [asdict(each) for each in refused],
        "gpu_memory_gb": own.config.cluster.gpu_memory_gb,
        "verdict": verdict(first, ordered) + _across(own),
        "assumptions": [
            f"links of a GPU inside its node {own.config.cluster.gpu_link_gb_s:g} GB/s each way, network of a node "
            f"{own.config.cluster.node_link_gb_s:g} GB/s each way (cluster file, not measured)",
            "all settings compute equally well but for what they recompute: kernels, launches, waits of the host and "
            "experts with more tokens than others are not in it; of equal ones that with fewer micro-batches is first",
        ],
    }


def ranked(estimates: list[Estimate]) -> list[Estimate]:
    """Best first: by the lowest bound in classes of five percent, since estimates within them are equal, in a class by
    what there is to hide, then by micro-batches and memory."""
    if not estimates:
        return []
    bound = min(each.lower_bound_s for each in estimates)

    def order(each: Estimate) -> tuple[float, ...]:
        grade = int(math.log(each.lower_bound_s / bound) / math.log(_EQUAL)) if bound else 0
        return grade, round(each.without_overlap_s, 9), each.accumulation, each.memory_bytes

    return sorted(estimates, key=order)


def verdict(own: Estimate, ordered: list[Estimate]) -> str:
    """Which setting should be faster, in sentences.

    Args:
        ordered: those that fit, best first.
    """
    if not ordered:
        return "No setting fits into the memory of a GPU: take more GPUs, shorter rows or a smaller model."
    best = ordered[0]
    if own.refused:
        return f"{own.name} {own.refused}; of the settings that fit {best.name} comes first."
    equal = own.lower_bound_s <= best.lower_bound_s * _EQUAL
    if equal and own.without_overlap_s <= best.without_overlap_s * _EQUAL:
        return f"No other setting should be faster than {own.name}."
    return f"{best.name} should be faster than {own.name}: {_why(best, own)}."


def _across(own: Setting) -> str:
    per_node = own.config.cluster.gpus_per_node
    if own.expert_parallel <= per_node:
        return ""
    return (
        f" Its experts are split over {own.expert_parallel} GPUs, and a node has {per_node}: every token crosses the "
        f"network, which no other setting here does."
    )


def _why(best: Estimate, own: Estimate) -> str:
    parts = [
        f"{getattr(best, field):.2g} s on the {label} in place of {getattr(own, field):.2g}"
        for field, label in _RESOURCES.items()
        if abs(getattr(best, field) - getattr(own, field)) > 0.01 * own.without_overlap_s
    ]
    spent = " and ".join(parts) or "a little less traffic"
    if own.lower_bound_s > best.lower_bound_s * _EQUAL and best.limited_by != own.limited_by:
        return f"{spent}. The one is limited by {best.limited_by}, the other by {own.limited_by}"
    less = best.memory_bytes / own.memory_bytes
    memory = f". {own.name} takes {less:.1f} times less memory" if less > _EQUAL else ""
    return f"both are limited by {own.limited_by}, but the first has less to do, {spent}{memory}"
