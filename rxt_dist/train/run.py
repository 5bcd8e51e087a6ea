"""Set a run up and train it: checks, ranks, directory, weights, engine, checkpoint, loop."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TextIO

import torch

import rxt_dist
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig
from rxt_dist.engine.build import build_engine, choose_device, describe_kernels, joined_ranks
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import ExitCode, SupersededError, UserError
from rxt_dist.files import lasting_errors
from rxt_dist.lives import Life, launched_by_us
from rxt_dist.model.init import InitialWeights
from rxt_dist.ranks import Ranks
from rxt_dist.stages.base import DataSource, build_network, stage_class
from rxt_dist.train.events import iso_time
from rxt_dist.train.loop import run_loop
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.preflight import order_lines, preflight
from rxt_dist.train.probe import check_probe
from rxt_dist.train.profile import Recording, profiling, require_steps
from rxt_dist.train.progress import Progress
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.resume import (
    Beginning,
    Position,
    choose_beginning,
    find_checkpoint,
    named_checkpoint,
    position_of,
    set_aside_after,
    set_weights,
)
from rxt_dist.train.rollback import joined_windows, read_past
from rxt_dist.train.run_dir import RunDirectory, require_checkpoint_of
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.training import Training
from rxt_dist.train.watchdog import Surroundings, Watchdog, collective_timeout


@dataclass(frozen=True)
class _Claim:
    """A run that this life holds, and where in it the life begins.

    Checkpoints after the one that the life begins with are set aside once it has begun.
    """

    directory: RunDirectory
    store: CheckpointStore
    checkpoint: Checkpoint | None
    position: Position
    beginning: Beginning
    remarks: list[str]


def train(
    config: RunConfig,
    ranks: Ranks,
    stop: StopRequest,
    profiled: int = 0,
    life: Life | None = None,
    from_step: int | None = None,
) -> ExitCode:
    """Train one rank's share of a run, from the newest valid checkpoint in its directory if there is one.

    Args:
        profiled: how many steps of this life are to be profiled.
        life: what the launcher says of it; None: nobody launched it.
        from_step: begin at this checkpoint instead of the newest; later ones are set aside.

    Raises:
        UserError: of any kind, with its exit code; before the model is built for all that can be known by then.
    """
    life = life or Life.of_process(os.environ)
    data = preflight(config, ranks.world_size)
    if profiled:
        require_steps(config, data, profiled)
    device = choose_device(ranks.local_rank)
    with ExitStack() as stack:
        plain, timeout = config.parallel.engine == "plain", collective_timeout(config.health.deadlines)
        group = stack.enter_context(joined_ranks(device, plain, timeout))
        watchdog = stack.enter_context(_watchdog(config, group))
        claim = _claim(stack, config, group, data, life, from_step)
        directory = claim.directory
        if any(group.together(lambda: group.rank == 0 and directory.finished_at(claim.position.step))):
            if group.rank == 0:
                print(f"run '{config.name}' is finished: {directory.path}", file=sys.stderr)
            return ExitCode.DONE
        group.together(lambda: _begin(config, group, claim, stop, life))
        group.together(lambda: stack.enter_context(_output_in(directory, ranks.rank)))
        code = _told(
            directory,
            life,
            group.rank,
            stop,
            lambda: _train(stack, config, stop, group, claim, data, watchdog, profiled, life),
        )
        # Rank 0 serves the store, by which the watchdogs of the others still ask.
        group.any(False)
        return code


def _claim(
    stack: ExitStack, config: RunConfig, group: Collectives, data: DataSource, life: Life, from_step: int | None
) -> _Claim:
    """Take the run for this life; rank 0 does, for all. Whatever refuses it leaves the directory as it was."""
    directory, trained = RunDirectory(config.directory), training_hash(config)

    def take() -> None:
        if group.rank:
            return
        with lasting_errors(directory.path):
            directory.check(resolved_yaml(config), trained)
            stack.enter_context(directory.locked())
            # Again, now that nobody else can change it.
            directory.check(resolved_yaml(config), trained)

    group.together(take)
    store = _store(config, directory)
    past = read_past(group, store, directory.jumps)
    find = find_checkpoint if from_step is None else partial(named_checkpoint, step=from_step)
    checkpoint, remarks = find(group, store, up_to=past.up_to)
    positions = [Position()]
    if checkpoint is not None:
        name, meta = checkpoint.path.name, checkpoint.meta
        group.together(lambda: require_checkpoint_of(directory.path, name, meta, trained))
        group.together(lambda: positions.append(position_of(checkpoint, data)))
    position = replace(positions[-1], jumps=joined_windows(positions[-1].jumps, past.windows))
    beginning = choose_beginning(config, checkpoint, group)
    return _Claim(directory, store, checkpoint, position, beginning, remarks)


def _store(config: RunConfig, directory: RunDirectory) -> CheckpointStore:
    kept = config.checkpoint
    return CheckpointStore(
        directory.checkpoints,
        kept.keep,
        directory.require_life,
        milestone_tokens=kept.milestone_tokens,
        keep_best=kept.keep_best,
    )


def _begin(config: RunConfig, group: Collectives, claim: _Claim, stop: StopRequest, life: Life) -> None:
    """Write what this life is: the first that a launch writes into a run. The event of its start tells a launcher that
    all of this is done."""
    if group.rank:
        return
    directory = claim.directory
    with lasting_errors(directory.path):
        directory.begin(resolved_yaml(config), training_hash(config), life, group.world_size)
        stop.clear_file()
        if stop.limit is not None:
            for event in directory.events.read():
                stop.limit.hear(event)
            directory.events.listen(stop.limit.hear)
        # Of a history that was given up; or rejected, perhaps by a disk that failed for a moment: a later life that
        # took one again would leave out the lines of the steps before it.
        end = claim.position.step
        aside = set_aside_after(claim.store, end, directory.metrics)
        if aside is not None:
            claim.remarks.append(f"the run goes on from step {end}; what was later is kept in {aside}")
        launched = iso_time(life.launched)
        directory.events.append(
            "start", life=life.token, ranks=group.world_size, launched=launched, attempt=life.attempt
        )
        if aside is not None:
            directory.events.append("set_aside", after=end, path=str(aside.relative_to(directory.path)))


def _told(directory: RunDirectory, life: Life, rank: int, stop: StopRequest, lived: Callable[[], ExitCode]) -> ExitCode:
    """Live, and say in events.jsonl how it ended. Of a crash our launcher says it, which knows all ranks."""

    def tell(code: int, reason: str) -> None:
        if rank == 0:
            # Whatever is wrong with the disk is not what ended this life.
            with suppress(OSError, UserError):
                directory.events.append(
                    "exit", code=int(code), reason=reason, step=directory.last_step(), life=life.token
                )

    try:
        code = lived()
    except SupersededError:  # The events are another life's by now.
        raise
    except UserError as error:
        tell(error.exit_code, str(error))
        raise
    except Exception as error:
        if not launched_by_us(os.environ):
            tell(1, f"{type(error).__name__}: {error}")
        raise
    tell(code, "finished" if code == ExitCode.DONE else stop.reason or "another rank was asked to stop")
    return code


def _train(
    stack: ExitStack,
    config: RunConfig,
    stop: StopRequest,
    group: Collectives,
    claim: _Claim,
    data: DataSource,
    watchdog: Watchdog,
    profiled: int,
    life: Life,
) -> ExitCode:
    directory, checkpoint, position = claim.directory, claim.checkpoint, claim.position
    beginning, origin = claim.beginning, claim.beginning.origin
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
    for text in (*described, *claim.remarks, *beginning.remarks):
        reporter.message(text)
    for change in directory.changes:
        reporter.event("changed", setting=change)
    if not directory.has_locks:
        reporter.event("unlocked", disk=str(directory.path))
    with watchdog.phase("load"):
        _set_state(config, engine, frozen, initial, claim, writer, reporter, partial(check_probe, engine, stage, data))
    identity = {
        "run_id": run_id,
        "ranks": group.world_size,
        "topology": config.parallel.model_dump(),
        "training_hash": training_hash(config),
        "tokenizer": data.facts.tokenizer_sha,
        "versions": {"rxt_dist": rxt_dist.__version__, "torch": torch.__version__},
        **({"origin": origin} if origin else {}),
    }
    recording = Recording(profiled, directory.profile, group.rank, group.device)
    profile = stack.enter_context(profiling(recording, reporter))
    reporter.event("ready", step=position.step, seconds=round(time.time() - life.launched, 3))
    training = Training(
        config,
        engine,
        stage,
        frozen,
        data,
        claim.store,
        stop,
        reporter,
        identity,
        directory,
        watchdog,
        profile,
    )
    return run_loop(training, position, checkpoint.meta if checkpoint else None)


def _watchdog(config: RunConfig, group: Collectives) -> Watchdog:
    directory = RunDirectory(config.directory)
    hosts = group.gather(platform.node())
    place = Surroundings(group.rank, hosts, directory.logs, directory.events, group.open_channel("watchdog"))
    return Watchdog(config.health.deadlines, place)


def _set_state(
    config: RunConfig,
    engine: Engine,
    frozen: FrozenWeights,
    initial: InitialWeights,
    claim: _Claim,
    writer: MetricsWriter | None,
    reporter: Reporter,
    check: Callable[[Checkpoint], str],
) -> None:
    """Give the engine the state of the checkpoint, or first weights; drop the lines that this life will repeat."""
    checkpoint, position, origin = claim.checkpoint, claim.position, claim.beginning.origin
    started = time.monotonic()
    if checkpoint is not None:
        load_state(engine, frozen, checkpoint, position.applied)
        reporter.message(check(checkpoint))
    else:
        set_weights(engine, frozen, config, initial, claim.beginning)

    def record() -> None:
        if writer is None:
            return
        seconds = round(time.monotonic() - started, 3)
        with lasting_errors(claim.directory.path):
            if checkpoint is not None:
                fields = {"seconds": seconds, **writer.lost_after(position.step)}
                name = checkpoint.path.name
                reporter.event("resume", step=position.step, row=position.row, checkpoint=name, **fields)
            elif origin is not None:
                reporter.event("begin", path=origin["path"], step=origin["step"], parts=origin["parts"])
            writer.truncate_after(position.step)
            if origin is not None:
                claim.directory.record_origin(origin)

    engine.ranks.together(record)


@contextmanager
def _output_in(directory: RunDirectory, rank: int) -> Iterator[None]:
    """Send what this rank and its libraries print to its log file; rank 0 keeps the terminal.

    An error that a person can act on leaves this block, so that it reaches the terminal whichever rank it is on. The
    traceback of any other stays in the log file, also of rank 0: mostly it only says that another rank has gone.
    """
    with _log(directory, rank) as log, _redirected(log) if rank else nullcontext():
        try:
            yield
        except UserError:
            raise
        except Exception:
            traceback.print_exc(file=log)
            raise


def _log(directory: RunDirectory, rank: int) -> TextIO:
    with lasting_errors(directory.path):
        directory.logs.mkdir(parents=True, exist_ok=True)
        return open(directory.log_file(rank), "a", encoding="utf-8")


@contextmanager
def _redirected(log: TextIO) -> Iterator[None]:
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(stream.fileno()) for stream in streams]
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
