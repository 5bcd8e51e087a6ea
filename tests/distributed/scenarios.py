"""What gloo ranks do in the tests: functions of (RankContext, ...) for `harness.Ranks.run`."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import deepspeed
import extended  # noqa: F401  (stages that only tests have)
import torch
import torch._dynamo
from harness import RankContext
from tiny import ROWS, TOKENS, batch_for, make_stage, model_config, relative, run_config
from torch import Tensor

import rxt_dist.engine.deepspeed as engine_module
from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import STAGES
from rxt_dist.engine.build import build_engine
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine, StepResult
from rxt_dist.engine.routing import routed_blocks
from rxt_dist.model.fused import compile_chains
from rxt_dist.model.moe import RoutedExperts
from rxt_dist.stages.base import MicroBatch, Stage

# Imported late, by what a run asks for: once here, before ranks are forked. Not every version of torch has all of them.
for _late in (
    "functorch.compile",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep",
    "deepspeed.moe.ep_kernels",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "rxt_dist.engine.plain",
    "rxt_dist.engine.replicated",
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
    *(entry.code.split(":")[0] for entry in STAGES.values()),
):
    with suppress(ModuleNotFoundError):
        importlib.import_module(_late)

LR = 1e-2
# Large enough that a gradient of rounding noise does not become a whole Adam step.
EPS = 1e-5
STEPS = 5
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def train(context: RankContext, topologies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train the tiny model once per topology, in this one process group; results are those of rank 0."""
    _join(context, any(topology.get("engine") != "plain" for topology in topologies))
    results = []
    for topology in topologies:
        results.append(_train(context, **topology))
    return results


def _train(
    context: RankContext,
    accumulation: int = 1,
    steps: int = STEPS,
    one_place: bool = False,
    poison: tuple[int, int] | None = None,
    reading: bool = False,
    backend: str | None = None,
    divided: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A few steps of one topology.

    Args:
        accumulation: micro-batches per step.
        one_place: routing biases send every token to the last two experts.
        poison: (step, rank) at which a gradient is NaN on that rank only.
        reading: before each step a part of the model is called without gradients, out of its usual order.
        backend: chains of operations are compiled with it.
        divided: ZeRO-3 divides all parameters, also the smallest.
        changes: see `config_of`.
    """
    changes = {"eps": EPS} | changes
    config = config_of(context, accumulation, **changes)
    stage = make_stage(config)
    give_biases(stage.model)
    shapes = {name: list(p.shape) for name, p in stage.model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in stage.model.named_parameters() if not p.requires_grad}
    with _dividing_all() if divided else nullcontext():
        engine = build_engine(stage, config, torch.device("cpu"))
    compile_chains(backend)
    if one_place:
        engine.routing.bias_ME[:, -2:] = 100.0
    poisoned = Poison(stage) if poison is not None else None
    records = []
    for step in range(steps):
        micros = rank_share(context, stage, config.train.micro_batch_rows, step)
        struck = poison is not None and step == poison[0]
        before = local_copy(engine) if struck else []
        if poisoned is not None and poison is not None:
            poisoned.active = struck and context.rank == poison[1]
        if reading:
            _read(engine, stage)
        rates = {group: LR * factor for group, factor in stage.rates(step * ROWS * TOKENS).items()}
        record = _record(engine.train_step(micros, rates))
        if struck:
            changed = not all(map(torch.equal, before, local_copy(engine)))
            record["unchanged"] = not engine.ranks.any(changed)
        records.append(record)
    evaluated = engine.evaluate(micros)
    state, wrong = canonical(engine, shapes)
    result = {
        "steps": records,
        "evaluated": evaluated.sums_J / evaluated.counts_J.clamp_min(1),
        "state": state,
        "fragments": wrong,
        "frozen": whole(engine, frozen),
        "routing": {name: tensor.clone() for name, tensor in engine.routing_state().items()},
        "agreed": len(set(engine.ranks.gather(str(records)))) == 1,
    }
    release(engine)
    return result if context.rank == 0 else {}


def _read(engine: Engine, stage: Stage) -> None:
    """Call a part of the model without gradients."""
    with engine.reading():
        tokens_BT = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % stage.run.model.vocab_size
        positions_BT = torch.arange(TOKENS).expand(ROWS, -1)
        read = stage.model.decoder(stage.model.embedding(tokens_BT), positions_BT, None)
        assert not read.hidden_BTD.requires_grad


@contextmanager
def _dividing_all() -> Iterator[None]:
    made = engine_module.engine_config

    def changed(*arguments: Any) -> dict[str, Any]:
        config = made(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    engine_module.engine_config = changed
    try:
        yield
    finally:
        engine_module.engine_config = made


def config_of(
    context: RankContext, accumulation: int = 1, layers: int = 1, local_biases: bool = False, **changes: Any
) -> RunConfig:
    """The tiny run on these ranks, with so many stateful layers between its others, whose memories are written
    with the mean of all. With local_biases every expert, routed or shared, has biases of its own; for the other changes
    see `run_config`."""
    biases = ("decoder.moe.bias=local", "decoder.moe.shared_bias=local") if local_biases else ()
    changes["model"] = model_config(f"layers={layers}", "memory_attention.groups=1", *biases)
    return run_config(micro_batch_rows=ROWS // context.world_size // accumulation, **changes)


def give_biases(model: torch.nn.Module) -> None:
    """Let biases of experts begin with other values than zero, and each expert with others."""
    for name, parameter in model.named_parameters():
        if name.endswith((".gate_up_bias", ".down_bias")):
            parameter.data = torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter)


def _join(context: RankContext, distributed: bool = True) -> None:
    if distributed:
        torch.distributed.init_process_group("gloo")


def rank_share(context: RankContext, stage: Stage, micro_rows: int, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of global batch `step`."""
    parts = batch_for(stage.run, step).micro_batches(micro_rows)
    share = len(parts) // context.world_size
    mine = parts[context.rank * share : (context.rank + 1) * share]
    return [stage.prepare(part, step * ROWS * TOKENS) for part in mine]


def _record(result: StepResult) -> dict[str, Any]:
    totals = result.totals
    return {
        "losses": totals.sums_J / totals.counts_J.clamp_min(1),
        "sums": totals.sums_J.tolist(),
        "counts": totals.counts_J,
        "hits": totals.hits_J,
        "grad_norm": result.grad_norm,
        "experts": result.expert_counts_ME.clone(),
        "applied": result.applied,
        "reason": result.reason,
    }


class Poison:
    """While active, the gradient of one attention weight of the last decoder layer is NaN on this rank."""

    def __init__(self, stage: Stage) -> None:
        self.active = False
        stage.model.decoder.layers[-1].attention.register_forward_hook(self._hook)

    def _hook(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.active and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output


def canonical(engine: Engine, shapes: dict[str, list[int]]) -> tuple[dict[str, Tensor], list[str]]:
    """The whole training state in the model's own layout, put together from the fragments of all ranks.

    Returns:
        {"kind:name": flat float32 tensor}, and complaints where owned fragments do not give every element exactly
        once, or all fragments together not at least once.
    """
    mine = [
        (owned, f"{kind}:{fragment.name}", fragment.start, tensor)
        for owned in (True, False)
        for fragment in engine.fragments(owned=owned)
        for kind, tensor in fragment.tensors.items()
    ]
    places = [(owned, key, start, tensor.numel()) for owned, key, start, tensor in mine]
    # One tensor a rank: thousands of small ones take seconds to be sent as objects.
    values = torch.cat([tensor.detach() for owned, *_, tensor in mine if owned])
    state: dict[str, Tensor] = {}
    times: dict[tuple[bool, str], Tensor] = {}
    for of_rank, given in objects_of(engine.ranks, (places, values)):
        at = 0
        for owned, key, start, length in of_rank:
            size = math.prod(shapes[key.split(":", 1)[1]])
            part = slice(start, start + length)
            assert part.stop <= size, f"{key}: a fragment reaches {part.stop} of {size}"
            if owned:
                state.setdefault(key, torch.zeros(size))[part] = given[at : at + length]
                at += length
            times.setdefault((owned, key), torch.zeros(size, dtype=torch.int64))[part] += 1
    wanted = {(owned, f"{kind}:{name}") for owned in (True, False) for kind in KINDS for name in shapes}
    wrong = [f"{key} is missing or too much" for _, key in sorted(wanted ^ times.keys())]
    for (owned, key), count in times.items():
        if not bool((count == 1).all() if owned else (count >= 1).all()):
            wrong.append(f"{key}, owned={owned}: given {count.unique().tolist()} times")
    return state, wrong


def objects_of(ranks: Collectives, value: Any) -> list[Any]:
    """What all ranks give, tensors too: tests may trust each other."""
    if not ranks.distributed:
        return [value]
    values = [None] * ranks.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def whole(engine: Engine, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """These parameters as they are in the engine's module now, gathered under ZeRO-3."""
    found = {}
    for name, parameter in engine.stage.model.named_parameters():
        if name in named:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name] = parameter.detach().clone()
    return found


def local_copy(engine: Engine) -> list[Tensor]:
    """All that this rank holds of the training state."""
    return [tensor.clone() for part in engine.fragments(owned=False) for tensor in part.tensors.values()]


def routed_block(context: RankContext, expert_parallel: int, bias: bool) -> dict[str, float]:
    """Largest relative differences between our routed block and AutoEP's on the same weights and input."""
    _join(context)
    config = run_config(zero=0, expert_parallel=expert_parallel)
    generator = torch.Generator().manual_seed(context.rank)
    x_BTD = torch.randn(2, 16, config.model.dim, generator=generator)
    weight_BTD = torch.randn(2, 16, config.model.dim, generator=generator)
    bias_E = torch.linspace(-0.2, 0.2, config.model.decoder.moe.experts) if bias else None
    results = []
    for parallel in (False, True):
        stage = make_stage(config)
        if parallel:
            build_engine(stage, config, torch.device("cpu"))
        block = routed_blocks(stage.model)[-1]
        assert isinstance(block, RoutedExperts) is not parallel
        block.set_choice_bias(bias_E)
        x = x_BTD.clone().requires_grad_()
        out, routing = block(x)
        logits = routing.logits_NE
        ((out * weight_BTD).sum() + logits.square().sum()).backward()
        gate = block.router.gate if parallel else block.gate
        results.append((out.detach(), logits.detach(), x.grad, gate.weight.grad))
    names = ("output", "logits", "input gradient", "router gradient")
    return {name: relative(theirs, ours) for name, ours, theirs in zip(names, *results, strict=True)}


def release(engine: Engine) -> None:
    """End an engine but keep the process group for the next one."""
    inner = getattr(engine, "engine", None)
    if inner is not None:
        inner.destroy()
    gc.collect()
    # What is left of it is small, and is not walked through again, ten times in the next one.
    gc.freeze()
