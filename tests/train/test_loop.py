"""The loop and evaluation with an engine that only writes down what it is given: rows, levels, rates, figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_run import SEQ_LEN, STEP_TOKENS, TinyRun, build_shards

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import DeadlinesConfig, RunConfig
from rxt_dist.engine.interface import NonFinite, StepResult, TermTotals
from rxt_dist.errors import DivergedError
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Term, build_network, stage_class
from rxt_dist.stages.joint import JointBatch
from rxt_dist.train import interval, loop
from rxt_dist.train.evaluate import evaluate
from rxt_dist.train.loop import _Life, run_loop
from rxt_dist.train.pace import Pace
from rxt_dist.train.preflight import preflight
from rxt_dist.train.resume import Position
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.saving import Saver
from rxt_dist.train.training import Training
from rxt_dist.train.watchdog import Surroundings, Watchdog

ROWS = STEP_TOKENS // SEQ_LEN
STEPS = 6


class LoneRanks:
    """A world in which only this rank speaks: sums are its own, and nobody else asks for a stop."""

    def __init__(self, world_size: int = 1, rank: int = 0) -> None:
        self.world_size, self.rank = world_size, rank

    def any(self, flag: bool) -> bool:
        return flag

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def together(self, action: Any) -> list[Any]:
        return [action()]

    device = torch.device("cpu")


@dataclass
class Recorder:
    """An engine. Step s has s + 1 targets a term, each with a loss of s, and none or all of them hit."""

    ranks: Any = field(default_factory=LoneRanks)
    applied: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    steps: list[tuple[list[JointBatch], float]] = field(default_factory=list)
    evaluated: list[list[JointBatch]] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)

    def train_step(self, micros: list[JointBatch], rates: dict[str, float], before_update: Any) -> StepResult:
        before_update()
        step = len(self.steps)
        self.steps.append((micros, rates["all"]))
        counts = torch.full((4,), step + 1.0, dtype=torch.float64)
        hits = torch.tensor([step % 2, 1, 0, 0]) * (step + 1)
        totals = TermTotals(counts * step, counts, hits, tokens=3 * (step + 1), pairs=7)
        return StepResult(self.applied, "" if self.applied else "non-finite loss", totals, 1.0, torch.ones(2, 8).long())

    def reading(self) -> Any:
        return nullcontext()

    def inspect(self, micros: list[JointBatch]) -> NonFinite | None:
        return NonFinite("decoder.layers.0", False, 1, 7)

    def differing_ranks(self) -> list[int]:
        return self.differing

    def evaluate(self, micros: list[JointBatch]) -> TermTotals:
        self.evaluated.append(micros)
        counts = torch.tensor([10, 20, 30, 30], dtype=torch.float64)
        return TermTotals(counts * torch.tensor([1.0, 2.0, 3.0, 4.0]), counts, torch.tensor([3, 8, 0, 0]), 30, 0)


class Listener:
    """A reporter that keeps what it should say."""

    def __init__(self) -> None:
        self.lines: list[tuple[Position, dict[str, Any], int]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def line(self, position: Position, figures: dict[str, Any], tokens: int) -> None:
        self.lines.append((position, figures, tokens))

    def event(self, kind: str, **values: Any) -> None:
        self.events.append((kind, values))

    def message(self, text: str) -> None: ...

    def is_evaluated(self, step: int) -> bool:
        return False

    def evaluation(self, step: int, tokens: int, results: Any, seconds: float) -> None: ...


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


def training_of(tmp_path: Path, shards: Path, engine: Recorder, *overrides: str) -> Training:
    # Two micro-batches a step.
    config: RunConfig = load_run(TinyRun(tmp_path, shards, STEPS).file, ["train.micro_batch_rows=4", *overrides])
    data = preflight(config, 1)
    model = build_network(config)
    initialise(model, 0)
    stage = stage_class(config)(model, config)
    stop = SimpleNamespace(reason=None)
    reporter: Any = Listener()
    directory = RunDirectory(tmp_path / "run")
    watchdog = Watchdog(DeadlinesConfig(), Surroundings(0, ["here"], directory.logs, directory.events, None))
    store = CheckpointStore(directory.checkpoints, 2)
    return Training(config, engine, stage, None, data, store, stop, reporter, {}, directory, watchdog)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "save", lambda saver, position, **others: None)


def samples_of(micros: list[JointBatch]) -> list[int]:
    return [sample for micro in micros for sample in micro.samples]


def test_each_step_has_its_rows_its_levels_and_its_rate(tmp_path: Path, shards: Path) -> None:
    """Levels are those of the tokens before a step, the learning rate is that of its end."""
    engine = Recorder()
    levels = [
        f"stage.memory_noise={{start: 0, end: 1, tokens: {STEP_TOKENS * STEPS}}}",
        f"stage.memory_masking={{start: 0, end: 0.6, tokens: {STEP_TOKENS * STEPS}}}",
    ]
    warm = f"schedule.warmup_tokens={STEP_TOKENS * STEPS}"
    training = training_of(tmp_path, shards, engine, *levels, warm)
    run_loop(training, Position())
    assert [samples_of(micros) for micros, _ in engine.steps] == [
        list(range(step * ROWS, (step + 1) * ROWS)) for step in range(STEPS)
    ]
    for step, (micros, lr) in enumerate(engine.steps):
        assert lr == pytest.approx(1e-3 * (step + 1) / STEPS)
        for micro in micros:
            assert (micro.noise, micro.masking) == pytest.approx((step / STEPS, 0.6 * step / STEPS))
    reporter: Any = training.reporter
    position, figures, tokens = reporter.lines[-1]
    assert (position.step, position.applied, position.row, tokens) == (STEPS, STEPS, STEPS * ROWS, STEPS * STEP_TOKENS)
    assert position.tokens_seen == 3 * sum(range(1, STEPS + 1))
    assert (figures["lr"], figures["noise"]) == pytest.approx((1e-3, (STEPS - 1) / STEPS))


def test_a_run_goes_on_where_its_position_says(tmp_path: Path, shards: Path) -> None:
    engine = Recorder()
    run_loop(training_of(tmp_path, shards, engine), Position(step=4, applied=4, row=4 * ROWS))
    assert [samples_of(micros)[0] for micros, _ in engine.steps] == [4 * ROWS, 5 * ROWS]


def test_ranks_read_the_slices_of_a_batch_one_after_another(tmp_path: Path, shards: Path) -> None:
    read = []
    for rank in range(4):
        engine = Recorder(LoneRanks(4, rank))
        run_loop(training_of(tmp_path, shards, engine, "train.micro_batch_rows=2", "log.every_steps=6"), Position())
        read.append([samples_of(micros) for micros, _ in engine.steps])
    for step in range(STEPS):
        assert [sample for of_rank in read for sample in of_rank[step]] == list(range(step * ROWS, (step + 1) * ROWS))


def test_losses_are_means_over_the_targets_of_an_interval(tmp_path: Path, shards: Path) -> None:
    engine = Recorder()
    training = training_of(tmp_path, shards, engine, "log.every_steps=3")
    run_loop(training, Position())
    reporter: Any = training.reporter
    # Lines after steps 1, 3 and 6; step s (from 0) has s + 1 targets with a loss of s.
    wanted = [0.0, (1 * 2 + 2 * 3) / 5, (3 * 4 + 4 * 5 + 5 * 6) / 15]
    assert [figures["ar_loss"] for _, figures, _ in reporter.lines] == pytest.approx(wanted)
    assert [figures["z_loss"] for _, figures, _ in reporter.lines] == pytest.approx(wanted)
    assert [figures["ar_accuracy"] for _, figures, _ in reporter.lines] == pytest.approx([0, 2 / 5, 10 / 15])
    assert [figures["mlm_accuracy"] for _, figures, _ in reporter.lines] == [1, 1, 1]


def test_saving_and_evaluating_are_no_training(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second of this clock, a save a hundred and an evaluation a thousand."""
    now = [0.0]

    def takes(seconds: float, result: Any = None) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds
            return result(*arguments) if result else None

        return run

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(interval, "time", clock)
    monkeypatch.setattr(Saver, "save", takes(100))
    monkeypatch.setattr(loop, "run_evaluation", takes(1000, lambda *_: []))
    engine = Recorder()
    monkeypatch.setattr(engine, "train_step", takes(1, engine.train_step))
    often = [f"checkpoint.every_tokens={2 * STEP_TOKENS}", f"eval.every_tokens={3 * STEP_TOKENS}", "log.every_steps=3"]
    training = training_of(tmp_path, shards, engine, *often)
    run_loop(training, Position())
    reporter: Any = training.reporter
    assert now[0] > 1000
    assert [figures["step_s"] for _, figures, _ in reporter.lines] == pytest.approx([1, 1, 1])


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, shards: Path) -> None:
    engine = Recorder(applied=False)
    training = training_of(tmp_path, shards, engine, "train.max_skipped_steps=3")
    with pytest.raises(DivergedError, match="3 updates in a row were not finite up to step 3"):
        run_loop(training, Position())
    reporter: Any = training.reporter
    assert [(kind, values["in_a_row"]) for kind, values in reporter.events] == [("skip", 1), ("skip", 2), ("skip", 3)]


def test_one_good_step_forgives_those_before(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()
    step = engine.train_step

    def now_and_then(micros: list[JointBatch], rates: dict[str, float], before_update: Any) -> StepResult:
        engine.applied = len(engine.steps) % 2 == 1
        return step(micros, rates, before_update)

    monkeypatch.setattr(engine, "train_step", now_and_then)
    training = training_of(tmp_path, shards, engine, "train.max_skipped_steps=2")
    run_loop(training, Position())
    reporter: Any = training.reporter
    assert reporter.lines[-1][0].applied == STEPS // 2


def test_evaluation_is_without_noise_and_its_figures_have_the_right_names(tmp_path: Path, shards: Path) -> None:
    engine = Recorder()
    training = training_of(tmp_path, shards, engine)
    results = evaluate(engine, training.stage, training.data, 4, 2)  # type: ignore[arg-type]
    assert [(result.source, result.view) for result in results] == [
        (source, memory) for source in ("en", "pl") for memory in ("true", "zero", "foreign")
    ]
    for result in results:
        assert (result.losses, result.accuracies) == ({"ar": 1.0, "mlm": 2.0}, {"ar": 0.3, "mlm": 0.4})
    for micros, result in zip(engine.evaluated, results, strict=True):
        assert {(micro.noise, micro.masking, micro.memory) for micro in micros} == {(0.0, 0.0, result.view)}


def test_ranks_evaluate_equally_often_and_what_fills_up_counts_for_nothing(tmp_path: Path, shards: Path) -> None:
    """Three pairs for two ranks: the second one's last pair is blank."""
    seen: list[list[JointBatch]] = []
    for rank in range(2):
        engine = Recorder(LoneRanks(2, rank))
        training = training_of(tmp_path, shards, engine)
        evaluate(engine, training.stage, training.data, 6, 2)  # type: ignore[arg-type]
        seen.append(engine.evaluated[0])
    assert [len(micros) for micros in seen] == [2, 2]
    assert [samples_of(micros) for micros in seen] == [[0, 1, 2, 3], [4, 5, 0, 0]]
    blank = seen[1][1]
    assert training.stage.counts(blank).tolist() == [0, 0, 0, 0]
    assert not blank.tokens_BT.any()
    assert all(training.stage.counts(micro)[0] > 0 for micro in (*seen[0], seen[1][0]))


def test_a_stage_may_make_several_updates_of_a_batch_and_look_at_its_model_first(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are batches: rows, rates and levels follow them; updates that were applied are counted one by one."""
    engine = Recorder()
    training = training_of(tmp_path, shards, engine)
    stage: Any = training.stage
    looked = []

    def twice(parts: Any, trained: int, reading: Any) -> Iterator[list[JointBatch]]:
        with reading():
            looked.append(trained)
        micros = [stage.prepare(part, trained) for part in parts]
        yield micros
        yield micros[:1]

    monkeypatch.setattr(stage, "updates", twice)
    run_loop(training, Position())
    reporter: Any = training.reporter
    position, figures, _ = reporter.lines[-1]
    assert (position.step, position.applied, position.row) == (STEPS, 2 * STEPS, STEPS * ROWS)
    assert looked == [step * STEP_TOKENS for step in range(STEPS)]
    assert [len(micros) for micros, _ in engine.steps] == [2, 1] * STEPS
    rates = [rate for _, rate in engine.steps]
    assert rates[::2] == rates[1::2]
    assert figures["step_s"] > 0


def test_each_group_learns_at_its_own_rate(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's factors, of the tokens before a step, times the rate of the step's end."""
    engine, given = Recorder(), []
    training = training_of(tmp_path, shards, engine, f"schedule.warmup_tokens={STEP_TOKENS * STEPS}")
    monkeypatch.setattr(training.stage, "rates", lambda tokens: {"all": 1.0, "late": float(tokens >= 2 * STEP_TOKENS)})
    step = engine.train_step

    def listen(micros: list[JointBatch], rates: dict[str, float], before_update: Any) -> StepResult:
        given.append(rates)
        return step(micros, rates, before_update)

    monkeypatch.setattr(engine, "train_step", listen)
    run_loop(training, Position())
    peaks = [1e-3 * (step + 1) / STEPS for step in range(STEPS)]
    assert [rates["all"] for rates in given] == pytest.approx(peaks)
    assert [rates["late"] for rates in given] == pytest.approx([0, 0, *peaks[2:]])


def test_several_updates_of_a_batch_are_one_step(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, steps and time of a step count once; updates, tokens and losses count all."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(interval, "time", clock)
    engine = Recorder()
    training = training_of(tmp_path, shards, engine, "log.every_steps=2")
    once = training.stage.updates

    def thrice(parts: Any, trained: int, reading: Any) -> Any:
        for _ in range(3):
            now[0] += 1
            yield from once(parts, trained, reading)

    monkeypatch.setattr(training.stage, "updates", thrice)
    run_loop(training, Position())
    assert len(engine.steps) == 3 * STEPS
    assert [samples_of(micros)[0] for micros, _ in engine.steps[:6]] == [0, 0, 0, ROWS, ROWS, ROWS]
    reporter: Any = training.reporter
    assert [position.step for position, _, _ in reporter.lines] == [1, 2, 4, 6]
    assert [figures["step_s"] for _, figures, _ in reporter.lines] == pytest.approx([3, 3, 3, 3])
    last, _, tokens = reporter.lines[-1]
    assert (last.applied, last.row, tokens) == (3 * STEPS, STEPS * ROWS, STEPS * STEP_TOKENS)
    assert last.tokens_seen == 3 * sum(range(1, 3 * STEPS + 1))


def test_a_stage_that_predicts_nothing_is_not_evaluated(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    training = training_of(tmp_path, shards, engine)
    monkeypatch.setattr(training.stage, "terms", (Term("regret"),))
    assert evaluate(engine, training.stage, training.data, 4, 2) == []  # type: ignore[arg-type]
    assert engine.evaluated == []


def test_what_predicts_nothing_is_evaluated_by_its_loss_alone(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    training = training_of(tmp_path, shards, engine)
    terms = (Term("distance", "distance"), Term("mlm", "masked", predicts=True), Term("balance"), Term("z"))
    monkeypatch.setattr(training.stage, "terms", terms)
    found = evaluate(engine, training.stage, training.data, 4, 2)[0]  # type: ignore[arg-type]
    assert (found.losses, found.accuracies) == ({"distance": 1.0, "mlm": 2.0}, {"mlm": 0.4})


def test_a_rank_that_waits_for_others_is_never_in_the_phase_of_the_start(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That phase may last an hour, and ranks talk between steps too: for log lines, and about saves."""
    training = training_of(tmp_path, shards, Recorder(), "log.every_steps=1", "checkpoint.every_minutes=60")
    phases: list[tuple[str, str]] = []

    def noting(kind: type[Any], name: str) -> None:
        talk = getattr(kind, name)

        def noted(*arguments: Any) -> Any:
            phases.append((name, training.watchdog._state.phase))
            return talk(*arguments)

        monkeypatch.setattr(kind, name, noted)

    noting(Pace, "exchange")
    noting(Saver, "due")
    run_loop(training, Position())
    after_the_first = [phase for name, phase in phases if name == "exchange"][1:]
    assert after_the_first == ["boundary"] * (STEPS - 1)
    assert {phase for name, phase in phases if name == "due"} == {"boundary"}


def test_steps_that_are_passed_over_leave_the_first_one_its_time_to_compile(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    training = training_of(tmp_path, shards, engine)
    phases: list[str] = []
    monkeypatch.setattr(
        engine,
        "train_step",
        lambda *arguments: (
            phases.append(training.watchdog._state.phase) or Recorder.train_step(engine, *arguments)  # type: ignore[func-returns-value]
        ),
    )
    run_loop(training, Position(jumps=((0, 2 * ROWS),)))
    assert phases == ["first-step", *["step"] * (STEPS - 3)]
    assert len(training.watchdog._steps) == STEPS - 2


def test_a_step_under_the_profiler_has_the_time_of_a_first_one(tmp_path: Path, shards: Path) -> None:
    life = _Life(training_of(tmp_path, shards, Recorder()), Position(), {})
    life._has_stepped = True
    assert (life._phase("step"), life._phase("boundary")) == ("step", "boundary")
    profiled = SimpleNamespace(active=True)
    life.training = replace(life.training, profile=profiled)  # type: ignore[arg-type]
    assert (life._phase("step"), life._phase("boundary")) == ("first-step", "set-up")


def test_waiting_before_an_update_is_a_stall_and_no_part_of_the_step(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Saver, "before_update", lambda _: time.sleep(0.2))
    training = training_of(tmp_path, shards, Recorder(), "log.every_steps=1")
    run_loop(training, Position())
    reporter: Any = training.reporter
    assert reporter.lines
    assert all(figures["step_s"] < 0.15 for _, figures, _ in reporter.lines)
