"""Set a run up and train it: checks, ranks, directory, model, engine, checkpoint, loop."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

import rxt_dist
from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig, StageConfig
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.sampler import DataState, GlobalOrder
from rxt_dist.engine.build import build_engine, choose_device, describe_kernels, joined_ranks
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError, ExitCode
from rxt_dist.model.init import initialise
from rxt_dist.ranks import Ranks
from rxt_dist.stages.joint import JointStage
from rxt_dist.train.loop import Position, Training, run_loop
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.preflight import order_lines, preflight, training_model
from rxt_dist.train.progress import Progress
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.voice import Voice


def train(config: RunConfig, ranks: Ranks, stop: StopRequest) -> ExitCode:
    """Train one rank's share of a run, from the newest valid checkpoint in its directory if there is one.

    Raises:
        UserError: of any kind, with its exit code; before the model is built for all that can be known by then.
    """
    dataset, order = preflight(config, ranks.world_size)
    device = choose_device(ranks.local_rank)
    if ranks.rank == 0:
        # Left by an earlier life; one made from here on is meant for this one.
        stop.clear_file()
    with ExitStack() as stack:
        group = stack.enter_context(joined_ranks(device, config.parallel.engine == "plain"))
        directory = RunDirectory.open(config.directory, resolved_yaml(config), training_hash(config), ranks.rank)
        group.together(lambda: stack.enter_context(directory.locked()) if group.rank == 0 else None)
        stack.enter_context(_output_in(directory, ranks.rank))
        return _train(stack, config, stop, group, directory, dataset, order)


def _train(
    stack: ExitStack,
    config: RunConfig,
    stop: StopRequest,
    group: Collectives,
    directory: RunDirectory,
    dataset: TokenDataset,
    order: GlobalOrder,
) -> ExitCode:
    model = training_model(config)
    initialise(model, config.seed)
    stage = JointStage(model, stage_config(config), config.seed, config.train.logit_chunk_tokens)
    engine = build_engine(stage, model, config, group.device)
    stack.callback(engine.close)
    store = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
    checkpoint, remarks = _find_checkpoint(group, store)
    run_id = checkpoint.meta["run_id"] if checkpoint else group.gather(uuid.uuid4().hex[:12])[0]
    writer = stack.enter_context(MetricsWriter(directory, config.log, run_id)) if group.rank == 0 else None
    voice = Voice(writer, stack.enter_context(Progress(config.train.total_tokens, group.rank == 0)))
    for text in (*engine.describe(), *describe_kernels(config, group.device), *order_lines(order), *remarks):
        voice.message(text)
    for change in directory.changes:
        voice.event("changed", setting=change)
    position = Position()
    if checkpoint is not None:
        DataState.from_dict(checkpoint.meta["data"]).check(order, dataset.digest)
        position = _position(checkpoint)
        load_state(engine, checkpoint, position.applied)
        voice.event("resume", step=position.step, row=position.row, checkpoint=checkpoint.path.name)
    if writer is not None:
        writer.truncate_after(position.step)
    if group.any(writer is not None and _is_finished(directory, position)):
        voice.message(f"run '{config.name}' is finished: {directory.path}")
        return ExitCode.DONE
    identity = {
        "run_id": run_id,
        "ranks": group.world_size,
        "topology": config.parallel.model_dump(),
        "training_hash": training_hash(config),
        "versions": {"rxt_dist": rxt_dist.__version__, "torch": torch.__version__},
    }
    return run_loop(Training(config, engine, stage, dataset, order, store, stop, voice, identity), position)


def stage_config(config: RunConfig) -> StageConfig:
    """The stage without its balance loss where biases balance the experts instead."""
    if config.train.balancing == "loss":
        return config.stage
    weights = config.stage.weights.model_copy(update={"balance": 0.0})
    return config.stage.model_copy(update={"weights": weights})


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


def _find_checkpoint(group: Collectives, store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, chosen by rank 0 for all, and what there is to say about rejected ones.

    Raises:
        CheckpointError: there are checkpoints, but none is valid. Starting again from nothing would destroy them and
            the run's history, when perhaps a disk is only not mounted.
    """

    def find() -> tuple[Checkpoint | None, list[str]]:
        remarks: list[str] = []
        found = store.latest_valid(remarks.append)
        if found is None and any(info.committed for info in store.list()):
            raise CheckpointError(
                f"No checkpoint in {store.directory} is valid, and this run will not start again from nothing over "
                f"them. {' '.join(remarks)} Restore the files, or remove the folder to start over."
            )
        return found, remarks

    return group.together(lambda: find() if group.rank == 0 else (None, []))[0]


def _position(checkpoint: Checkpoint) -> Position:
    try:
        return Position(**checkpoint.meta["position"])
    except TypeError as error:
        raise CheckpointError(
            f"The position in {checkpoint.path} is {checkpoint.meta['position']}, which this version of the program "
            "does not understand. Resume with the version named in its manifest."
        ) from error


def _is_finished(directory: RunDirectory, position: Position) -> bool:
    """Whether an earlier life trained and evaluated everything up to this position."""
    if not directory.events.exists():
        return False
    lines = directory.events.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return any(event["kind"] == "finish" and event["step"] == position.step for event in events)
