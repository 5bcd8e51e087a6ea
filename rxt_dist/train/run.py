"""Set a run up and train it: data, directory, model, engine, checkpoint, loop.

Everything that can be refused is refused before the model is built, and nothing is overwritten before that.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

import torch

import rxt_dist
from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig, StageConfig
from rxt_dist.config.validate import DataFacts, validate_run
from rxt_dist.data.dataset import TokenDataset, verify_dataset
from rxt_dist.data.format import tokenizer_fingerprint
from rxt_dist.data.sampler import DataState, GlobalOrder, Phase, integer_weights, proportional_weights
from rxt_dist.engine.build import build_engine, describe_kernels, start_ranks
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError, DataError, ExitCode
from rxt_dist.files import require_free_space
from rxt_dist.model.count import count_system
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.joint import JointStage
from rxt_dist.train.loop import Position, Training, run_loop
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.progress import Progress
from rxt_dist.train.ranks import Ranks
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.voice import Voice

# Weights and two moments in float32.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_VERIFIED_AT_START_BYTES = 4 << 30


def train(config: RunConfig, ranks: Ranks, stop: StopRequest) -> ExitCode:
    """Train one rank's share of a run, from the newest valid checkpoint in its directory if there is one.

    Raises:
        UserError: of any kind, with its exit code; before the model is built for all that can be known by then.
    """
    dataset, order = open_data(config, ranks.world_size)
    # While a checkpoint is written, the ones that it will replace are still there.
    needed = 2 * _CHECKPOINT_BYTES_PER_PARAMETER * count_system(config.model).total
    require_free_space(config.directory, needed, "The checkpoints of this run")
    directory = RunDirectory.open(config.directory, resolved_yaml(config), training_hash(config), ranks.rank)
    _redirect_output(directory, ranks.rank)
    device = start_ranks(ranks.world_size, ranks.local_rank, config.parallel.engine == "plain")
    with ExitStack() as stack:
        model = build_model(config)
        stage = JointStage(model, stage_config(config), config.seed, config.train.logit_chunk_tokens)
        engine = build_engine(stage, model, config, device)
        stack.callback(engine.close)
        store = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
        checkpoint, remarks = _find_checkpoint(engine, store)
        run_id = checkpoint.meta["run_id"] if checkpoint else engine.ranks.gather(uuid.uuid4().hex[:12])[0]
        writer = None
        if ranks.rank == 0:
            stop.clear_file()
            writer = stack.enter_context(MetricsWriter(directory, config.log, run_id))
        voice = Voice(writer, stack.enter_context(Progress(config.train.total_tokens, ranks.rank == 0)))
        for text in (*engine.describe(), *describe_kernels(config, device), *remarks):
            voice.message(text)
        position = Position()
        if checkpoint is not None:
            position = _resume(engine, order, dataset, checkpoint)
            voice.event("resume", step=position.step, row=position.row, checkpoint=checkpoint.path.name)
        if writer is not None:
            writer.truncate_after(position.step)
        identity = {"run_id": run_id, "ranks": ranks.world_size, "topology": config.parallel.model_dump()}
        identity |= {"training_hash": training_hash(config), "versions": _versions()}
        training = Training(config, engine, stage, dataset, order, store, stop, voice, identity)
        if engine.ranks.any(writer is not None and _is_finished(directory, position)):
            voice.message(f"run '{config.name}' is finished: {directory.path}")
            return ExitCode.DONE
        return run_loop(training, position)


def _redirect_output(directory: RunDirectory, rank: int) -> None:
    """Send what this rank and its libraries print to its log file; rank 0 keeps the terminal."""
    if rank == 0:
        return
    directory.logs.mkdir(parents=True, exist_ok=True)
    with open(directory.log_file(rank), "a") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


def open_data(config: RunConfig, world_size: int) -> tuple[TokenDataset, GlobalOrder]:
    """Open the shards, check the run against them, and plan the order of their rows.

    Raises:
        DataError, ConfigError: data that is damaged, missing or not what model and run need.
    """
    wanted = _fingerprint(config.data.tokenizer) if config.data.tokenizer else None
    dataset = TokenDataset(config.data.path, wanted)
    _verify_small(dataset)
    manifest = dataset.manifest
    names = tuple(source.name for source in dataset.sources)
    facts = DataFacts(dataset.seq_len, manifest.vocab_size, names, manifest.tokenizer_sha256)
    validate_run(config, world_size, facts)
    sources = dataset.order_sources()
    total = config.train.total_tokens
    phases = [
        Phase(phase.tokens or total, integer_weights([phase.weights.get(name, 0.0) for name in names]))
        for phase in config.data.mixture
    ]
    if not phases:
        phases = [Phase(total, proportional_weights([source.rows for source in sources]))]
    return dataset, GlobalOrder(sources, phases, config.seed, dataset.seq_len, config.data.max_epochs)


def _verify_small(dataset: TokenDataset) -> None:
    """Hash data up to a size that costs about a second before anything is built; the rest is hashed at first use."""
    if sum(shard.bytes for shard in dataset.manifest.shards()) > _VERIFIED_AT_START_BYTES:
        return
    damaged = verify_dataset(dataset.root, lambda shard: None)
    if damaged:
        name, problem = damaged[0]
        raise DataError(
            f"{dataset.root / name} {problem} ({len(damaged)} damaged files in all). Delete the damaged files, which "
            f"`rxt-dist data verify {dataset.root}` lists, and run the same `rxt-dist data build` again."
        )


def _fingerprint(tokenizer: Path) -> str:
    try:
        return tokenizer_fingerprint(tokenizer.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.tokenizer is {tokenizer}, which cannot be read as a tokenizer.json: {error}. Name the file that "
            "the data was built with, or leave the field out to take the data's own."
        ) from error


def stage_config(config: RunConfig) -> StageConfig:
    """The stage without its balance loss where biases balance the experts instead."""
    if config.train.balancing == "loss":
        return config.stage
    weights = config.stage.weights.model_copy(update={"balance": 0.0})
    return config.stage.model_copy(update={"weights": weights})


def build_model(config: RunConfig) -> ReactiveTransformer:
    """The network of this stage with its initial weights; memory attention is not part of joint pre-training."""
    model = ReactiveTransformer(config.model.model_copy(update={"memory_attention": None}))
    initialise(model, config.seed)
    return model


def _find_checkpoint(engine: Engine, store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, chosen by rank 0 for all, and what there is to say about rejected ones."""
    remarks: list[str] = []
    found = store.latest_valid(remarks.append) if engine.ranks.rank == 0 else None
    return engine.ranks.gather((found, remarks))[0]


def _resume(engine: Engine, order: GlobalOrder, dataset: TokenDataset, checkpoint: Checkpoint) -> Position:
    """Load a checkpoint and return its position; refuses data that is not the data it was trained on."""
    DataState.from_dict(checkpoint.meta["data"]).check(order, dataset.digest)
    try:
        position = Position(**checkpoint.meta["position"])
    except TypeError as error:
        raise CheckpointError(
            f"The position in {checkpoint.path} is {checkpoint.meta['position']}, which this version of the program "
            "does not understand. Resume with the version named in its manifest."
        ) from error
    load_state(engine, checkpoint, position.applied)
    return position


def _is_finished(directory: RunDirectory, position: Position) -> bool:
    """Whether an earlier life trained and evaluated everything up to this position."""
    if not directory.events.exists():
        return False
    events = [json.loads(line) for line in directory.events.read_text().splitlines() if line.endswith("}")]
    return any(event["kind"] == "finish" and event["step"] == position.step for event in events)


def _versions() -> dict[str, str]:
    return {"rxt_dist": rxt_dist.__version__, "torch": torch.__version__}
