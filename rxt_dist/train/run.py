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
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

import rxt_dist
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.store import Checkpoint
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
from rxt_dist.train.claim import Claim, claim_run
from rxt_dist.train.events import iso_time
from rxt_dist.train.loop import run_loop
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.preflight import order_lines, preflight
from rxt_dist.train.probe import check_probe
from rxt_dist.train.profile import Recording, profiling, require_steps
from rxt_dist.train.progress import Progress
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.resume import set_aside_after, set_weights
from rxt_dist.train.rollback import keep_jumps, spans
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.training import Training
from rxt_dist.train.watchdog import Surroundings, Watchdog, collective_timeout


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
        claim = claim_run(stack, config, group, data, from_step)
        directory = claim.directory
        if claim.is_finished:
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


def _begin(config: RunConfig, group: Collectives, claim: Claim, stop: StopRequest, life: Life) -> None:
    """Write what this life is: the first that a launch writes into a run. The event of its start tells a launcher that
    all of this is done, and that it need not name a checkpoint again."""
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
        aside, again = None, []
        if claim.is_named:
            aside = set_aside_after(claim.store, claim.position.step, directory.metrics)
            again = keep_jumps(directory.jumps, claim.position.jumps)
        launched = iso_time(life.launched)
        directory.events.append(
            "start", life=life.token, ranks=group.world_size, launched=launched, attempt=life.attempt
        )
        if aside is not None:
            claim.candidates.remarks.append(f"what was later than {claim.position.step} is kept in {aside}")
            directory.events.append("set_aside", **_set_aside(claim, aside))
        if again:
            claim.candidates.remarks.append(f"rows that were passed over are trained on again: {spans(again)}")
            directory.events.append("again", rows=again)


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
    claim: Claim,
    data: DataSource,
    watchdog: Watchdog,
    profiled: int,
    life: Life,
) -> ExitCode:
    directory = claim.directory
    # Without weights: an engine makes room for what this rank holds of them.
    with torch.device("meta"):
        stage = stage_class(config)(build_network(config), config)
    initial = InitialWeights(stage.model, config.seed)
    frozen = FrozenWeights(stage.model, group)
    engine = build_engine(stage, config, group.device)
    stack.callback(engine.close)
    run_id = claim.checkpoint.meta["run_id"] if claim.checkpoint else group.gather(uuid.uuid4().hex[:12])[0]
    writer = stack.enter_context(MetricsWriter(directory, config.log, run_id)) if group.rank == 0 else None
    progress = stack.enter_context(Progress(config.train.total_tokens, group.rank == 0))
    reporter = Reporter(writer, progress, stage.terms)
    described = (*engine.describe(), *describe_kernels(config, group.device), *order_lines(data.order))
    for text in (*described, *claim.beginning.remarks):
        reporter.message(text)
    for change in directory.changes:
        reporter.event("changed", setting=change)
    if not directory.has_locks:
        reporter.event("unlocked", disk=str(directory.path))
    with watchdog.phase("load"):
        claim = _set_state(claim, engine, frozen, initial, writer, reporter, partial(check_probe, engine, stage, data))
    position, origin = claim.position, claim.beginning.origin
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
    return run_loop(training, position, claim.checkpoint.meta if claim.checkpoint else None)


def _watchdog(config: RunConfig, group: Collectives) -> Watchdog:
    directory = RunDirectory(config.directory)
    hosts = group.gather(platform.node())
    place = Surroundings(group.rank, hosts, directory.logs, directory.events, group.open_channel("watchdog"))
    return Watchdog(config.health.deadlines, place)


def _set_state(
    claim: Claim,
    engine: Engine,
    frozen: FrozenWeights,
    initial: InitialWeights,
    writer: MetricsWriter | None,
    reporter: Reporter,
    check: Callable[[Checkpoint], str],
) -> Claim:
    """Give the engine the state of the newest whole checkpoint, or first weights; set aside what is later, and drop the
    lines that this life will repeat.

    Returns:
        The claim of a life that begins there.
    """
    started = time.monotonic()
    claim = claim.loaded(engine, frozen, reporter.message)
    if claim.checkpoint is not None:
        reporter.message(check(claim.checkpoint))
    else:
        set_weights(engine, frozen, claim.config, initial, claim.beginning)
    seconds = round(time.monotonic() - started, 3)
    engine.ranks.together(lambda: _record_state(claim, writer, reporter, seconds) if writer is not None else None)
    return claim


def _set_aside(claim: Claim, folder: Path) -> dict[str, Any]:
    """What the event says of it."""
    return {"after": claim.position.step, "path": str(folder.relative_to(claim.directory.path))}


def _record_state(claim: Claim, writer: MetricsWriter, reporter: Reporter, seconds: float) -> None:
    directory, checkpoint, origin = claim.directory, claim.checkpoint, claim.beginning.origin
    end = claim.position.step
    # Of a history that was given up; or rejected, perhaps by a disk that failed for a moment: a later life that took
    # one again would leave out the lines of the steps before it.
    aside = set_aside_after(claim.store, end, directory.metrics)
    with lasting_errors(directory.path):
        if aside is not None:
            reporter.event("set_aside", **_set_aside(claim, aside))
        if checkpoint is not None:
            fields = {"seconds": seconds, **writer.lost_after(end)}
            name = checkpoint.path.name
            reporter.event("resume", step=end, row=claim.position.row, checkpoint=name, **fields)
        elif origin is not None:
            reporter.event("begin", path=origin["path"], step=origin["step"], parts=origin["parts"])
        writer.truncate_after(end)
        if origin is not None:
            directory.record_origin(origin)


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
