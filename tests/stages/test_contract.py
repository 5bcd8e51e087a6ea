"""What every stage of the registry keeps, and the stage of docs/extending.md: a new one inherits this proof.

Several ranks are in tests/distributed/test_stages_on_ranks.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import extended  # noqa: F401  (adds the stage of docs/extending.md)
import pytest
import torch
from tiny import ROWS, TOKENS, batch_for, make_stage, relative, run_config
from training_run import SHARED_BY_TWO, STEP_TOKENS, TinyRun, build_interaction_shards, build_shards

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.state import load_state, save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import STAGES
from rxt_dist.config.validate import settle_topology, validate_run
from rxt_dist.engine.interface import KINDS
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import ConfigError, ExitCode, UserError
from rxt_dist.model.init import initialise
from rxt_dist.plan.run import plan_run
from rxt_dist.ranks import Ranks
from rxt_dist.stages.base import Stage, Work, stage_class
from rxt_dist.train.admission import admitted
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

CPU = torch.device("cpu")
EACH_STAGE = pytest.mark.parametrize("kind", STAGES)


# Turns that are computed again give the same (tests/stages/test_smat.py) and take four times as long here.
CHEAPER: dict[str, dict[str, Any]] = {"smat": {"recompute_turns": False}}


def config_of(kind: str, **changes: Any) -> RunConfig:
    return run_config(stage=kind, **CHEAPER.get(kind, {}), **changes)


def engine_of(config: RunConfig, seed: int = 0) -> PlainEngine:
    stage = make_stage(config)
    initialise(stage.model, seed)
    return PlainEngine(stage, config, CPU)


def step(engine: PlainEngine, number: int, rows: int = ROWS, lr: float = 1e-2, trained: int | None = None) -> Any:
    stage: Stage = engine.stage  # type: ignore[assignment]
    trained = number * ROWS * TOKENS if trained is None else trained
    rates = {group: lr * factor for group, factor in stage.rates(trained).items()}
    parts = batch_for(stage.run, number).micro_batches(rows)
    (micros,) = stage.updates(parts, trained, engine.reading)
    return engine.train_step(micros, rates)


def groups_of(stage: Stage) -> dict[str | None, list[str]]:
    """Names of parameters by their group of learning rates; None: frozen."""
    found: dict[str | None, list[str]] = {}
    for name, _ in stage.model.named_parameters():
        found.setdefault(stage.run.stage.rate_group(name), []).append(name)
    return found


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.model.named_parameters()}


def changed(before: dict[str, torch.Tensor], stage: Stage, names: Iterable[str]) -> list[bool]:
    now = weights_of(stage)
    return [not torch.equal(before[name], now[name]) for name in names]


@EACH_STAGE
def test_what_a_stage_says_of_itself_fits_together(kind: str) -> None:
    config = config_of(kind)
    stage = make_stage(config)
    assert config.stage.kind == kind
    names = [term.name for term in stage.terms]
    assert len(set(names)) == len(names)
    assert stage.weights().shape == (len(names),)
    assert (stage.weights() > 0).any()
    micro = stage.prepare(batch_for(config), 0)
    assert stage.counts(micro).shape == (len(names),)
    assert stage.counts(micro).dtype == torch.float64
    assert {name.split(".")[0] for name, _ in stage.model.named_parameters()} == set(config.stage.parts())
    assert set(stage.rates(0)) == set(groups_of(stage)) - {None}
    assert all(math.isfinite(value) for tokens in (0, 10**12) for value in stage.levels(tokens).values())
    assert {name for name, p in stage.model.named_parameters() if not p.requires_grad} == set(
        groups_of(stage).get(None, [])
    )


@EACH_STAGE
def test_where_biases_balance_the_experts_no_loss_does(kind: str) -> None:
    stage = make_stage(config_of(kind, balancing="bias"))
    assert all(weight == 0 for term, weight in zip(stage.terms, stage.weights(), strict=True) if term.name == "balance")


@EACH_STAGE
def test_a_micro_batch_is_made_in_host_memory(kind: str) -> None:
    """Nobody asks a device what the host knows; the engine copies it, once."""
    stage = make_stage(config_of(kind))
    for tokens in (0, None):
        micro = stage.prepare(batch_for(stage.run), tokens)
        assert all(value.device == CPU for value in vars(micro).values() if isinstance(value, torch.Tensor))
        assert isinstance(micro.tokens, int)
        assert isinstance(micro.pairs, int)
        batch = batch_for(stage.run)
        assert (micro.tokens, micro.pairs) == (batch.real_tokens, batch.pairs)


@EACH_STAGE
@pytest.mark.slow
def test_the_parts_of_a_batch_are_the_batch(kind: str) -> None:
    stage = make_stage(config_of(kind))
    batch = batch_for(stage.run, 3)
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    whole = stage.prepare(batch, 1000)
    expected = stage(whole, load)
    for rows in (1, 2, 4):
        micros = [stage.prepare(part, 1000) for part in batch.micro_batches(rows)]
        outputs = [stage(micro, load) for micro in micros]
        torch.testing.assert_close(sum(o.sums_J for o in outputs), expected.sums_J, rtol=1e-5, atol=1e-6)
        assert torch.equal(sum(o.hits_J for o in outputs), expected.hits_J)
        assert torch.equal(sum(o.expert_counts_ME for o in outputs), expected.expert_counts_ME)
        assert torch.equal(sum(stage.counts(micro) for micro in micros), stage.counts(whole))
        assert sum(micro.tokens for micro in micros) == whole.tokens
        assert sum(micro.pairs for micro in micros) == whole.pairs


@EACH_STAGE
@pytest.mark.slow
def test_a_step_is_a_function_of_weights_and_batch(kind: str) -> None:
    """Twice from the start, with the global generator moved in between: bit for bit; and again in smaller parts."""
    results = []
    for rows in (ROWS, ROWS, ROWS // 4):
        engine = engine_of(config_of(kind, eps=1e-5))
        torch.rand(7)
        totals = [step(engine, number, rows) for number in range(3)][-1].totals
        results.append((totals.sums_J / totals.counts_J.clamp_min(1), weights_of(engine.stage)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], weight) for name, weight in results[1][1].items())
    torch.testing.assert_close(results[2][0], results[0][0], rtol=1e-5, atol=0)
    assert max(relative(results[2][1][name], weight) for name, weight in results[0][1].items()) < 2e-5


@EACH_STAGE
@pytest.mark.slow
def test_what_is_frozen_and_what_has_no_rate_stays(kind: str) -> None:
    engine = engine_of(config_of(kind, weight_decay=0.5))
    stage: Stage = engine.stage  # type: ignore[assignment]
    for trained in (0, 10**12):
        before = weights_of(stage)
        rates = stage.rates(trained)
        step(engine, 0, trained=trained)
        for group, names in groups_of(stage).items():
            if group is None or rates[group] == 0:
                assert not any(changed(before, stage, names)), group
            else:
                assert any(changed(before, stage, names)), group


@EACH_STAGE
@pytest.mark.slow
def test_a_group_with_the_rate_zero_stays_bit_for_bit(kind: str) -> None:
    engine = engine_of(config_of(kind, weight_decay=0.5))
    stage: Stage = engine.stage  # type: ignore[assignment]
    groups = [group for group in groups_of(stage) if group is not None]
    for still in groups:
        before = weights_of(stage)
        micros = [stage.prepare(batch_for(stage.run), 0)]
        engine.train_step(micros, {group: 0.0 if group == still else 1e-2 for group in groups})
        assert not any(changed(before, stage, groups_of(stage)[still]))


@EACH_STAGE
@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_of_all_parts(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    engine = engine_of(config)
    stage: Stage = engine.stage  # type: ignore[assignment]
    frozen = FrozenWeights(stage.model, engine.ranks)
    for number in range(2):
        step(engine, number)
    store = CheckpointStore(tmp_path, 2)
    save_state(engine, frozen, store, 2, {})
    wanted = [step(engine, number) for number in range(2, 4)]

    other = make_stage(config)
    initialise(other.model, 9)
    checkpoint = store.latest_valid(print)
    assert checkpoint is not None
    other_frozen = FrozenWeights(other.model, engine.ranks)
    resumed = PlainEngine(other, config, CPU)
    load_state(resumed, other_frozen, checkpoint, 2)
    again = [step(resumed, number) for number in range(2, 4)]
    for mine, theirs in zip(again, wanted, strict=True):
        assert torch.equal(mine.totals.sums_J, theirs.totals.sums_J)
        assert mine.grad_norm == theirs.grad_norm
    assert state_checksum(resumed, other_frozen) == state_checksum(engine, frozen)
    saved = SavedPieces(checkpoint)
    trained = {name: parameter.requires_grad for name, parameter in stage.model.named_parameters()}
    assert {name for _, name in saved.places} == set(trained)
    assert {kind for kind, name in saved.places if not trained[name]} <= {"weight"}
    assert {kind for kind, name in saved.places if trained[name]} == set(KINDS)


@EACH_STAGE
@pytest.mark.slow
def test_evaluation_changes_nothing_and_repeats_itself(kind: str) -> None:
    engine = engine_of(config_of(kind))
    stage: Stage = engine.stage  # type: ignore[assignment]
    step(engine, 0)
    before = state_checksum(engine, FrozenWeights(stage.model, engine.ranks))
    figures: dict[str, list[Any]] = {}
    for rows in (ROWS, stage.rows_together, ROWS):
        parts = [stage.views(stage.prepare(part, None)) for part in batch_for(stage.run, 5).micro_batches(rows)]
        assert len({tuple(views) for views in parts}) == 1
        for view in parts[0]:
            totals = engine.evaluate([views[view] for views in parts])
            figures.setdefault(view, []).append(totals)
    assert state_checksum(engine, FrozenWeights(stage.model, engine.ranks)) == before
    for seen in figures.values():
        assert torch.equal(seen[0].sums_J, seen[2].sums_J)
        torch.testing.assert_close(seen[1].sums_J, seen[0].sums_J, rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[1].hits_J, seen[0].hits_J)
    # A term that is reported once for all views is the same in all of them.
    for at, term in enumerate(stage.terms):
        if term.title and not term.by_view:
            assert len({seen[0].sums_J[at].item() for seen in figures.values()}) == 1


@EACH_STAGE
@pytest.mark.slow
def test_reading_gives_no_gradients_and_leaves_the_next_step_alone(kind: str) -> None:
    alone, reading = engine_of(config_of(kind)), engine_of(config_of(kind))
    stage: Stage = reading.stage  # type: ignore[assignment]
    with reading.reading():
        output = stage(stage.prepare(batch_for(stage.run, 4), None), reading.routing.load_ME)
    assert not output.sums_J.requires_grad
    assert torch.equal(step(reading, 0).totals.sums_J, step(alone, 0).totals.sums_J)
    assert all(torch.equal(weights_of(alone.stage)[name], weight) for name, weight in weights_of(stage).items())


@EACH_STAGE
def test_operations_grow_with_the_work(kind: str) -> None:
    config = config_of(kind)
    code = stage_class(config)
    stage = make_stage(config)
    micro = stage.prepare(batch_for(config), 0)
    counts = dict(zip((term.name for term in stage.terms), stage.counts(micro).tolist(), strict=True))
    once = code.flops(config, Work(micro.tokens, micro.pairs, counts))
    twice = code.flops(config, Work(2 * micro.tokens, 2 * micro.pairs, {k: 2 * count for k, count in counts.items()}))
    assert once > micro.tokens
    assert twice == pytest.approx(2 * once)
    longer = code.flops(config, Work(micro.tokens, 2 * micro.pairs, counts))
    assert longer > once
    expected = code.expected_work(config, 10_000, 100)
    assert expected.tokens == 10_000
    assert code.flops(config, expected) > 10_000


# ---------------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------------


READS = {"sft": "single", "decoder-sft": "single", "memory": "dialogues", "smat": "dialogues"}
# A step of the tiny run is then a whole number of dialogues.
SETTINGS = {"memory": "turns: 2, ", "smat": "turns: 2, recompute_turns: false, "}
# Terms of which the datasets have nothing to count.
UNCOUNTED = {"smat": ("recall", "recall-1")}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of each kind."""
    documents = build_shards(tmp_path_factory.mktemp("documents"))
    tokenizer = documents / "tokenizer.json"
    chats = {
        kind: build_interaction_shards(tmp_path_factory.mktemp(kind), tokenizer, kind)
        for kind in ("single", "dialogues")
    }
    return {"documents": documents, **chats}


@pytest.fixture
def shards(kind: str, datasets: dict[str, Path]) -> Path:
    """What the stage reads."""
    return datasets[READS.get(kind, "documents")]


def stage_override(kind: str) -> str:
    return f"stage={{{SETTINGS.get(kind, '')}kind: {kind}}}"


def fresh(tiny: TinyRun, kind: str, *overrides: str) -> RunConfig:
    """A run of the stage, with the word that all may begin afresh where it expects something else."""
    settings = [stage_override(kind), *([SHARED_BY_TWO] if READS.get(kind) == "dialogues" else []), *overrides]
    if expected := load_run(tiny.file, settings).stage.expects():
        settings.append(f"start={{fresh: [{', '.join(expected)}]}}")
    return load_run(tiny.file, settings)


def trained(tiny: TinyRun, kind: str, *overrides: str) -> ExitCode:
    config = fresh(tiny, kind, "eval.every_tokens=2560", *overrides)
    with StopRequest(tiny.directory / "STOP") as stop:
        return train(config, Ranks(0, 1, 0), stop)


def lines_of(tiny: TinyRun) -> list[dict[str, Any]]:
    timed = ("time", "tokens_per_s", "mfu", "step_s", "data_wait_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in tiny.lines()]


@pytest.mark.slow
@EACH_STAGE
def test_a_run_reports_its_terms_and_goes_on_after_a_stop(kind: str, tmp_path: Path, shards: Path) -> None:
    """Stopped twice and begun again: the same lines as in one life."""
    whole, stopped = (TinyRun(tmp_path / name, shards, steps=8) for name in ("whole", "stopped"))
    for tiny in (whole, stopped):
        tiny.folder.mkdir()
    assert trained(whole, kind) == ExitCode.DONE
    assert trained(stopped, kind, "train.max_skipped_steps=7", "log.every_steps=1") == ExitCode.DONE
    assert lines_of(stopped) == lines_of(whole)
    shutil.rmtree(stopped.directory / "checkpoints/step-00000008")
    (stopped.directory / "events.jsonl").unlink()
    assert trained(stopped, kind) == ExitCode.DONE
    assert [event["step"] for event in stopped.events("resume")] == [5]
    assert lines_of(stopped) == lines_of(whole)

    stage = make_stage(load_run(whole.file, [stage_override(kind)]))
    terms = [term for term in stage.terms if term.name not in UNCOUNTED.get(kind, ())]
    line = whole.lines()[0]
    assert not any(key.startswith(UNCOUNTED.get(kind, ("none",))) for key in line)
    for term in terms:
        if term.detail and f"{term.name}_loss" not in line:
            continue  # A batch may have none of it.
        assert math.isfinite(line[f"{term.name}_loss"])
        assert (f"{term.name}_accuracy" in line) == term.predicts
    assert {"lr", "grad_norm", "tokens", "tokens_seen", "mfu", "step_s", "skipped"} <= line.keys()
    assert line["tokens"] == STEP_TOKENS
    evaluated = [line for line in whole.lines() if any(key.startswith("eval/") for key in line)]
    assert len(evaluated) == 2
    for term in terms:
        if term.title:
            sources = {key.split("/")[1] for key in evaluated[-1] if key.endswith(f"/{term.name}_loss")}
            assert sources == {"en", "pl"} or (term.detail and sources < {"en", "pl"})


@EACH_STAGE
@pytest.mark.slow
def test_a_cluster_takes_it(kind: str, tmp_path: Path, shards: Path) -> None:
    """On two ranks or one; in a job that is submitted while the run it begins from is still trained, too."""
    engine = "parallel={engine: deepspeed, zero: 1, expert_parallel: 0}"
    own = [stage_override(kind), engine, "train.micro_batch_rows=1"]
    config = fresh(TinyRun(tmp_path, shards), kind, *own[1:])
    assert admitted(config, [2, 1], start_later=False) == [2, 1]
    start = f"start={{run: {tmp_path}/first, parts: {list(config.stage.parts())}}}"
    later = load_run(TinyRun(tmp_path, shards).file, [*own, start])
    assert admitted(later, [2], start_later=True) == [2]
    with pytest.raises(UserError):
        admitted(later, [2], start_later=False)


@EACH_STAGE
def test_experts_that_do_not_train_are_not_split(kind: str, tmp_path: Path, shards: Path) -> None:
    wanted = [stage_override(kind), "parallel={engine: deepspeed, zero: 1, expert_parallel: 2}", SHARED_BY_TWO]
    config = fresh(TinyRun(tmp_path, shards), kind, *wanted[1:], "cluster.gpus_per_node=2")
    model = make_stage(config_of(kind)).model
    if any(parameter.requires_grad and ".experts." in name for name, parameter in model.named_parameters()):
        validate_run(config, 2, None)
        return
    with pytest.raises(ConfigError, match="trains no experts, and only trained ones can be split"):
        validate_run(config, 2, None)
    free = config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_parallel": 0})})
    assert settle_topology(free, 2).parallel.expert_parallel == 1


@EACH_STAGE
def test_a_plan_counts_what_the_stage_builds(kind: str, tmp_path: Path, shards: Path) -> None:
    config = load_run(TinyRun(tmp_path, shards).file, [stage_override(kind)])
    plan = plan_run(config)
    stage = make_stage(config)
    trained_ = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    assert sum(plan["trained_parameters"].values()) == trained_
    assert plan["frozen_parameters"] == sum(p.numel() for p in stage.model.parameters()) - trained_
    assert plan["time"]["flops_per_token"] > 0
