"""What gloo ranks do in the tests of first weights and of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import nvtx
from harness import RankContext
from scenarios import LR, canonical, config_of, objects_of, rank_share, release, whole
from tiny import ROWS, make_stage, run_config

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import RunConfig
from rxt_dist.data.loader import token_batch
from rxt_dist.engine.build import build_engine, keep_freed_memory
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine
from rxt_dist.engine.zero3_over_gloo import PortionedAverage
from rxt_dist.model.experts import ExpertStack
from rxt_dist.model.init import InitialWeights
from rxt_dist.plan.memory import memory_per_gpu
from rxt_dist.plan.setting import Setting
from rxt_dist.stages.base import Stage, build_network, stage_class
from rxt_dist.train.resume import Beginning, set_weights

CPU = torch.device("cpu")
DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"
LENGTH, STEPS = 64, 2
# What a rank of tests takes before it has a model, with the CPU build of torch that the plan's figure is of; the CUDA
# build has larger libraries, 0.12 GB.
PROGRAM_BYTES = 304_000_000


def begun(config: RunConfig) -> tuple[Stage, Engine, FrozenWeights]:
    """A run with its first weights, begun as `rxt-dist train` does: from a network that has none."""
    with torch.device("meta"):
        stage = stage_class(config)(build_network(config), config)
    initial, frozen = InitialWeights(stage.model, config.seed), FrozenWeights(stage.model, Collectives(CPU))
    engine = build_engine(stage, config, CPU)
    set_weights(engine, frozen, config, initial, Beginning())
    return stage, engine, frozen


def first_weights(context: RankContext, topologies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each topology: the state before and after a step, begun without weights and with all of them."""
    torch.distributed.init_process_group("gloo")
    results = []
    for topology in topologies:
        config = config_of(context, **topology)
        model = make_stage(config).model
        shapes = {name: list(value.shape) for name, value in model.named_parameters()}
        frozen = {name: value.detach() for name, value in model.named_parameters() if not _trained(config, name)}
        result: dict[str, Any] = {"wanted": {name: value.detach() for name, value in model.named_parameters()}}
        for way in ("pieces", "whole"):
            stage, engine, shares = begun(config) if way == "pieces" else _whole(config)
            result[way] = {"first": canonical(engine, shapes)[0], "frozen": whole(engine, frozen)}
            held = [(part.name, part.start, part.tensors["weight"]) for part in shares.fragments()]
            result[way]["shares"] = [piece for of_rank in objects_of(engine.ranks, held) for piece in of_rank]
            engine.train_step(
                rank_share(context, stage, config.train.micro_batch_rows, 0), dict.fromkeys(stage.rates(0), LR)
            )
            result[way]["trained"] = canonical(engine, shapes)[0]
            release(engine)
        results.append(result)
    return results if context.rank == 0 else []


def _trained(config: RunConfig, name: str) -> bool:
    return config.stage.rate_group(name) is not None


def _whole(config: RunConfig) -> tuple[Stage, Engine, FrozenWeights]:
    stage = make_stage(config)
    frozen = FrozenWeights(stage.model, Collectives(CPU))
    return stage, build_engine(stage, config, CPU), frozen


def memory(context: RankContext, topology: dict[str, Any], experts: int, saved: bool) -> dict[str, Any]:
    """Bytes that this rank takes at most in set-up and two steps, and where it is `saved` besides; what was planned,
    for a program of this one's size."""
    keep_freed_memory()
    torch.distributed.init_process_group("gloo")
    parallel = ", ".join(f"{key}: {value}" for key, value in topology.items())
    changes = [
        *("model.dim=512", "model.layers=2", "model.decoder.moe.hidden=1024", f"model.decoder.moe.experts={experts}"),
        *(f"parallel={{{parallel}}}", "train.micro_batch_rows=1", f"cluster.gpus_per_node={context.world_size}"),
        *(f"data.seq_len={LENGTH}", f"train.global_batch_tokens={LENGTH * context.world_size}"),
    ]
    config = load_run(DEMO, changes)
    planned, program = memory_per_gpu(Setting.of(config)), _resident("VmRSS")
    _reset_peak()
    stage, engine, frozen = begun(config)
    peaks = [_resident("VmHWM")]
    ahead: list[str] = []
    if topology["zero"] == 3 and context.world_size > 1:
        _watch_gathering(stage, ahead)
    generator = np.random.default_rng(context.rank)
    for step in range(STEPS):
        tokens = torch.from_numpy(generator.integers(16, 4096, (1, LENGTH)).astype(np.int16))
        batch = token_batch(tokens, np.array([1]), np.array([LENGTH]), np.zeros(1, np.int64), np.array([step]))
        assert engine.train_step([stage.prepare(batch, 0)], {"all": 1e-3}).applied
    peaks.append(_resident("VmHWM"))
    _reset_peak()
    resting = _resident("VmRSS")
    if saved:
        save_state(engine, frozen, CheckpointStore(context.folder / "checkpoints", 2), STEPS, {})
    largest = max(tensor.numel() for part in engine.fragments(owned=True) for tensor in part.tensors.values())
    return {
        "set-up": peaks[0],
        "steps": peaks[1],
        "save": _resident("VmHWM") - resting,
        "largest": 4 * largest,
        "program": program,
        "planned": planned.total + program - PROGRAM_BYTES,
        "copied masters": _copied_masters(engine),
        "gathered ahead": ahead,
    }


def averages(context: RankContext, shapes: list[list[int]], elements: int) -> dict[str, Any]:
    """This rank's parts of the averages of random gradients; what each rank has; sizes of the buffers that were given
    away."""
    torch.distributed.init_process_group("gloo")
    generators = [torch.Generator().manual_seed(rank) for rank in range(context.world_size)]
    every = [[torch.randn(shape, generator=generator) for shape in shapes] for generator in generators]
    gradients = [gradient.clone() for gradient in every[context.rank]]
    sent: list[int] = []
    reduce = torch.distributed.reduce

    def counted(given: torch.Tensor, **where: Any) -> Any:
        sent.append(given.numel())
        return reduce(given, **where)

    torch.distributed.reduce = counted
    try:
        parts = PortionedAverage(elements)(gradients)
    finally:
        torch.distributed.reduce = reduce
    own = all(
        part.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
        for part, gradient in zip(parts, gradients, strict=True)
    )
    return {"parts": [part.clone() for part in parts], "every": every, "sent": sent, "in place": own}


def gathered(context: RankContext, steps: int) -> dict[str, Any]:
    """How many weights a rank of ZeRO-3 gathers in each step of dialogues of unequal length and in an evaluation, and
    how many it keeps whole; what functions torch asks for their signatures meanwhile, and calls marked for a profiler.
    """
    torch.distributed.init_process_group("gloo")
    config = run_config(micro_batch_rows=ROWS // context.world_size, stage="smat", zero=3, expert_parallel=1)
    stage = make_stage(config)
    engine: Any = build_engine(stage, config, CPU)
    gather, numbers = partition_parameters._dist_allgather_fn, [0]

    def counted(*arguments: Any) -> Any:
        numbers[-1] += 1
        return gather(*arguments)

    asked: set[str] = set()
    signature, marked = torch.autograd.function.inspect.signature, [0]

    def noted(function: Any) -> Any:
        asked.add(function.__qualname__)
        return signature(function)

    def mark(*_: Any) -> None:
        marked[0] += 1

    partition_parameters._dist_allgather_fn = counted
    torch.autograd.function.inspect.signature = noted  # type: ignore[assignment]
    assert hasattr(nvtx, "_range_push")
    nvtx._range_push = nvtx._range_pop = mark
    first, *_ = (vars(module)["pre_bwd_fn"] for module in engine.wrapper.modules())
    torch.autograd.Function.apply.__func__(first, torch.ones(1))
    assert asked, "what would be asked for in each call is not noted"
    asked.clear()
    for step in range(steps):
        micros = rank_share(context, stage, config.train.micro_batch_rows, step)
        engine.train_step(micros, dict.fromkeys(stage.rates(0), LR))
        engine.evaluate(micros)
        numbers.append(0)
    kept = len(engine.zero.persistent_parameters)
    return {"gathered": numbers[:steps], "kept": kept, "asked": sorted(asked), "marked": marked[0]}


def _watch_gathering(stage: Stage, ahead: list[str]) -> None:
    """Note which other experts have their weights, or are about to, when a layer's experts begin their forward pass."""
    stacks = [module for module in stage.model.modules() if isinstance(module, ExpertStack)]

    def look(stack: ExpertStack, _: Any) -> None:
        others: list[Any] = [weight for other in stacks if other is not stack for weight in other.parameters()]
        ahead.extend(weight.ds_status.name for weight in others if weight.ds_status.name != "NOT_AVAILABLE")

    for stack in stacks:
        stack.register_forward_pre_hook(look)


def _copied_masters(engine: Any) -> int:
    """Groups of ZeRO-3 whose float32 masters are another memory than the weights."""
    if engine.config.parallel.zero < 3:
        return 0
    masters, weights = engine.zero.fp32_partitioned_groups_flat, engine.zero.fp16_partitioned_groups_flat
    return sum(one.data_ptr() != other.data_ptr() for one, other in zip(masters, weights, strict=True))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
