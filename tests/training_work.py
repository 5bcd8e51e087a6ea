"""What one step of training really allocates on this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tiny import make_stage
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler

from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.data.interactions import ANSWER_ID, QUERY_ID
from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.data.rows import BOS_ID
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.plan.setting import Setting
from rxt_dist.stages.base import Stage


def batch_of(setting: Setting, step: int = 0) -> TokenBatch | TurnBatch:
    """A micro-batch of random tokens, each row one document, or a dialogue whose turns are as long as they may be."""
    rows, length, turns = setting.micro_rows, setting.seq_len, setting.config.stage.dialogue().number
    if setting.config.stage.kind in ("memory", "smat"):
        random = torch.Generator().manual_seed(step)
        ids = torch.randint(16, setting.config.model.vocab_size, (rows, turns, length), generator=random)
        # An answer as long as it may be.
        ids[:, :, :4] = torch.tensor([BOS_ID, QUERY_ID, 16, ANSWER_ID])
        recalls = torch.zeros(rows, turns, 3, dtype=torch.int64)
        return TurnBatch(ids, torch.full((rows, turns), length), torch.arange(rows), recalls)
    tokens = np.random.default_rng(step).integers(16, setting.config.model.vocab_size, (rows, length))
    narrow = torch.from_numpy(tokens.astype(np.uint16).view(np.int16))
    samples = np.arange(rows) + step * rows
    return token_batch(narrow, np.full(rows, 1), np.full(rows, length), np.zeros(rows, np.int64), samples)


def saved_bytes(stage: Stage, setting: Setting) -> int:
    """Bytes that autograd keeps of one forward pass, each piece of memory once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.model.parameters()}
    kept: dict[int, int] = {}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # So that its memory is not given to another.
        return tensor

    moe = setting.config.model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(stage.prepare(batch_of(setting), 0), torch.zeros(moe.moe_layers, moe.decoder.moe.experts))
    assert output.sums_J.requires_grad
    return sum(kept.values())


def peak_of_a_step(setting: Setting) -> int:
    """Bytes that torch has allocated at most in one step of the plain engine, over what it had before."""
    stage = make_stage(setting.config)
    engine = PlainEngine(stage, setting.config, torch.device("cpu"))
    # Moments are there from the first step on; a list of views makes them.
    list(engine.fragments(owned=True))
    micro = [stage.prepare(batch_of(setting, 1), 0)]
    recorded = _allocations(lambda: engine.train_step(micro, dict.fromkeys(stage.rates(0), 1e-3)))
    return int(np.cumsum(recorded).max())


def _allocations(action: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of torch while `action` runs, in their order.

    What torch.profiler does with `profile_memory`, but without its records of every operation, which take longer than
    the step.
    """
    activities = {ProfilerActivity.CPU}
    wanted = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    _prepare_profiler(wanted, activities)
    _enable_profiler(wanted, activities, {RecordScope.USER_SCOPE})
    try:
        action()
    finally:
        recorded = _disable_profiler().events()
    events = [event for event in recorded if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
