"""Memory of one GPU, by item, at the moment of a step at which it is largest.

A parameter takes its weight (2 bytes in bfloat16, else 4), a float32 gradient (4), and two moments (8) with, in
bfloat16, a float32 master weight (4). ZeRO stage 1 divides the last over the ranks that hold copies, stage 2 also the
gradient, stage 3 also the weight; a frozen parameter takes its weight alone. Dense parameters have a copy on every
rank; of the routed experts a rank holds 1 / expert_parallel, with ranks / expert_parallel copies of it.

The rest comes and goes: activations pile up until the forward pass ends, and in the backward pass gradients take their
place, a layer after the other. The step is gone through layer by layer for the moment at which the sum is largest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rxt_dist.model.count import local_moe_parameters
from rxt_dist.plan.activations import Layer, backward_passes, kept_memories_bytes, logit_bytes, memory_bytes, turn_bytes
from rxt_dist.plan.setting import FLOAT32_BYTES, Setting

# Python and its libraries, measured on CPU; a CUDA context, which is not measured here, takes its place on a GPU.
_PROCESS_BYTES = 400_000_000
# A tenth is left for fragmentation and for what no estimate knows.
USABLE = 0.9
# Elements that are reduced or updated at once; a larger parameter goes alone (rxt_dist/engine/deepspeed.py).
_PORTION_ELEMENTS = 1 << 24
# Of them, what DeepSpeed reduces at once on CPU.
_CPU_BUCKET_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by item at the peak of a step.

    weights, optimizer: exact. gradients: those that are kept at the peak. activations: what the backward pass still
    needs. logits: of one chunk of positions. gathered: weights that ZeRO-3 holds whole while it computes with them.
    passing: gradients of the layer at work before they are reduced, copies for their reduction, and what the layer's
    backward pass takes. buffers: in which gradients are collected for their reduction. process: what a process takes
    before it has a model. heap, on CPU: what the C library keeps of blocks that were freed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    passing: int
    buffers: int
    process: int
    heap: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(asdict(self).values())

    def fits(self, gpu_memory_gb: float) -> bool:
        """Whether a GPU has room for it."""
        return self.total <= USABLE * gpu_memory_gb * 1e9

    def items(self) -> dict[str, int]:
        """By name, what is an estimate marked as one."""
        exact = ("weights", "optimizer")
        named = {name if name in exact else f"{name}_estimate": value for name, value in asdict(self).items()}
        return named | {"total_estimate": self.total}


def memory_per_gpu(setting: Setting) -> Memory:
    """The peak of a step under this setting."""
    weights = optimizer = 0.0
    masters = 2 if setting.element_bytes == FLOAT32_BYTES else 3
    for parameters, frozen, copies in setting.held:
        weights += (parameters + frozen) * setting.element_bytes / (copies if setting.zero >= 3 else 1)
        optimizer += parameters * masters * FLOAT32_BYTES / (copies if setting.zero >= 1 else 1)
    gone_through = moments(setting)
    peak = max(gone_through, key=lambda moment: moment.total)
    return Memory(
        round(weights),
        peak.gradients,
        round(optimizer),
        peak.activations,
        peak.logits,
        _gathered(setting),
        peak.passing,
        _buffers(setting),
        _PROCESS_BYTES,
        # Measured: as much again as is allocated and freed in small blocks in every step.
        max(moment.activations for moment in gone_through) if setting.on_cpu else 0,
    )


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step, as in `Memory`."""

    gradients: int
    activations: int
    logits: int
    passing: int

    @property
    def total(self) -> int:
        """Of all four."""
        return self.gradients + self.activations + self.logits + self.passing


def moments(setting: Setting) -> list[Moment]:
    """The end of the forward pass, the backward pass of each layer, of turns that are computed again both for the last
    and for the one before it; the update."""
    passes, found = backward_passes(setting), []
    last = passes[0][-1].turn
    kept, growing = _gradients(setting)
    # Autograd sums a parameter's gradients over all turns before anybody learns of them.
    done = summed = 0
    for passed in passes:
        stored = kept_memories_bytes(setting) + sum(layer.stored for layer in passed)
        begin = turn_bytes(setting) + (0 if growing else summed)
        computed = stored + memory_bytes(setting)
        found.append(Moment(kept + round(growing * done), computed, logit_bytes(setting), begin))
        for layer in reversed(passed):
            made = _elements(setting, layer)
            done += made if layer.turn == last else 0
            summed += made * setting.element_bytes if layer.turn == last > 0 else 0
            passing = layer.inside + _passing(setting, layer, made)
            found.append(Moment(kept + round(growing * done), stored, 0, passing + (0 if growing else summed)))
            stored -= layer.stored
            summed -= made * setting.element_bytes if layer.turn == 0 < last else 0
    every = sum(parameters for parameters, _, _ in setting.held)
    found.append(Moment(kept + round(growing * every), 0, 0, _updated(setting)))
    return found


def _gradients(setting: Setting) -> tuple[int, float]:
    """(bytes kept from one micro-batch to the next, bytes for each element that has been through the backward pass)."""
    divided = setting.zero >= 2
    whole = sum(parameters * FLOAT32_BYTES / (copies if divided else 1) for parameters, _, copies in setting.held)
    if divided or setting.accumulation > 1 or (setting.zero == 1 and setting.element_bytes != FLOAT32_BYTES):
        return round(whole), 0
    return 0, FLOAT32_BYTES


def _elements(setting: Setting, layer: Layer) -> int:
    """Trained parameters of a layer on this rank."""
    dense, routed = setting.built.by_layer.get(layer.path, (0, 0))
    return dense + routed // setting.expert_parallel


def _passing(setting: Setting, layer: Layer, elements: int) -> int:
    """A layer's gradients, where they do not stay as they are, and the copy in which they are summed or reduced."""
    _, growing = _gradients(setting)
    fresh = 0 if growing else elements * setting.element_bytes
    copied = setting.zero >= 1 or setting.element_bytes != FLOAT32_BYTES
    if setting.on_cpu and setting.zero == 3 and setting.element_bytes == FLOAT32_BYTES:
        # They pass through the buffers in portions. Averages of split experts are over fewer ranks than their sums,
        # and DeepSpeed scales them in a copy.
        copied = setting.expert_parallel > 1
    return fresh + copied * elements * FLOAT32_BYTES


def _gathered(setting: Setting) -> int:
    """Weights of the layer at work, on a GPU of the next one too. DeepSpeed copies them also where a rank holds all of
    them, which it takes experts for whose copies are all on one."""
    if setting.zero < 3 or setting.config.cluster.ranks == 1 or "decoder" not in setting.config.stage.parts():
        return 0
    layer = local_moe_parameters(setting.config.model, setting.expert_parallel)
    return (1 if setting.on_cpu else 2) * layer * setting.element_bytes


def _buffers(setting: Setting) -> int:
    """What is reduced at once: in a bucket, on a GPU also in the other one or in a copy that is laid out for the ranks.

    On CPU, ZeRO-3 has such a copy too.
    """
    ranks, elements = setting.config.cluster.ranks, sum(parameters for parameters, _, _ in setting.held)
    if setting.zero == 0:
        return min(elements, _PORTION_ELEMENTS) * FLOAT32_BYTES if ranks > 1 else 0
    if not setting.on_cpu:
        return 2 * min(elements, _PORTION_ELEMENTS) * FLOAT32_BYTES
    return (2 if setting.zero == 3 else 1) * min(elements, _CPU_BUCKET_ELEMENTS) * FLOAT32_BYTES


def _updated(setting: Setting) -> int:
    """The copy of the gradients that are updated at once."""
    if setting.zero == 0:
        return 0
    share = sum(parameters // copies for parameters, _, copies in setting.held)
    return min(share, _PORTION_ELEMENTS) * FLOAT32_BYTES
