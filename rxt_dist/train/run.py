"""Set a run up and train it: checks, ranks, directory, weights, engine, checkpoint, loop."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

import rxt_dist
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig
from rxt_dist.engine.build import build_engine, choose_device, describe_kernels, joined_ranks
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import ExitCode
from rxt_dist.model.init import InitialWeights
from rxt_dist.ranks import Ranks
from rxt_dist.stages.base import DataSource, build_network, stage_class
from rxt_dist.train.loop import run_loop
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.preflight import order_lines, preflight
from rxt_dist.train.profile import Recording, profiling, require_steps
from rxt_dist.train.progress import Progress
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.resume import Position, choose_beginning, find_checkpoint, position_of, set_weights
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.training import Training


def train(config: RunConfig, ranks: Ranks, stop: StopRequest, profiled: int = 0) -> ExitCode:
    """Train one rank's share of a run, from the newest valid checkpoint in its directory if there is one.

    Args:
        profiled: how many steps of this life are to be profiled.

    Raises:
        UserError: of any kind, with its exit code; before the model is built for all that can be known by then.
    """
    data = preflight(config, ranks.world_size)
    if profiled:
        require_steps(config, data, profiled)
    device = choose_device(ranks.local_rank)
    if ranks.rank == 0:
        # Left by an earlier life; one made from here on is meant for this one.
        stop.clear_file()
    with ExitStack() as stack:
        group = stack.enter_context(joined_ranks(device, config.parallel.engine == "plain"))
        directory = RunDirectory.open(config.directory, resolved_yaml(config), training_hash(config), ranks.rank)
        group.together(lambda: stack.enter_context(directory.locked()).value if group.rank == 0 else None)
        stack.enter_context(_output_in(directory, ranks.rank))
        return _train(stack, config, stop, group, directory, data, profiled)


def _train(
    stack: ExitStack,
    config: RunConfig,
    stop: StopRequest,
    group: Collectives,
    directory: RunDirectory,
    data: DataSource,
    profiled: int,
) -> ExitCode:
    store = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
    checkpoint, remarks = find_checkpoint(group, store)
    position = position_of(checkpoint, data) if checkpoint else Position()
    beginning = choose_beginning(config, checkpoint, group)
    origin = beginning.origin
    # Without weights: an engine makes room for what this rank holds of them.
    with torch.device("meta"):
        stage = stage_class(config)(build_network(config), config)
    initial = InitialWeights(stage.model, config.seed)
    frozen = FrozenWeights(stage.model, group)
    engine = build_engine(stage, config, group.device)
    stack.callback(engine.close)
    run_id = checkpoint.meta["run_id"] if checkpoint else group.gather(uuid.uuid4().hex[:12])[0]
    writer = stack.enter_context(MetricsWriter(directory, config.log, run_id)) if group.rank == 0 else None
    progress = stack.enter_context(Progress(config.train.total_tokens, group.rank == 0))
    reporter = Reporter(writer, progress, stage.terms)
    described = (*engine.describe(), *describe_kernels(config, group.device), *order_lines(data.order))
    for text in (*described, *remarks, *beginning.remarks):
        reporter.message(text)
    for change in directory.changes:
        reporter.event("changed", setting=change)
    if not directory.has_locks:
        reporter.event("unlocked", disk=str(directory.path))
    if checkpoint is not None:
        load_state(engine, frozen, checkpoint, position.applied)
        reporter.event("resume", step=position.step, row=position.row, checkpoint=checkpoint.path.name)
    else:
        set_weights(engine, frozen, config, initial, beginning)
        if origin is not None:
            reporter.event("begin", path=origin["path"], step=origin["step"], parts=origin["parts"])
    if writer is not None:
        writer.truncate_after(position.step)
        if origin is not None:
            directory.record_origin(origin)
    if group.any(writer is not None and directory.events.finished_at(position.step)):
        reporter.message(f"run '{config.name}' is finished: {directory.path}")
        return ExitCode.DONE
    identity = {
        "run_id": run_id,
        "ranks": group.world_size,
        "topology": config.parallel.model_dump(),
        "training_hash": training_hash(config),
        "versions": {"rxt_dist": rxt_dist.__version__, "torch": torch.__version__},
        **({"origin": origin} if origin else {}),
    }
    recording = Recording(profiled, directory.profile, group.rank, group.device)
    profile = stack.enter_context(profiling(recording, reporter))
    return run_loop(Training(config, engine, stage, frozen, data, store, stop, reporter, identity, profile), position)


@contextmanager
def _output_in(directory: RunDirectory, rank: int) -> Iterator[None]:
    """Send what this rank and its libraries print to its log file; rank 0 keeps the terminal.

    An error that ends the run leaves this block, so that it reaches the terminal whichever rank it is on.
    """
    if rank == 0:
        yield
        return
    directory.logs.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(stream.fileno()) for stream in streams]
    with open(directory.log_file(rank), "a", encoding="utf-8") as log:
        for stream in streams:
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        try:
            yield
        finally:
            for stream, terminal in zip(streams, kept, strict=True):
                stream.flush()
                os.dup2(terminal, stream.fileno())
                os.close(terminal)
