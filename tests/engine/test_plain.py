"""The plain engine is the oracle of all others, so here it is compared with a step written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import ROWS, make_stage, packed_batch, relative, run_config

from rxt_dist.engine import plain
from rxt_dist.engine.interface import StepResult
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.stages.joint import JointBatch, JointStage

CPU = torch.device("cpu")
TRAINED = 100_000


def engine_of(**changes: object) -> PlainEngine:
    config = run_config(**changes)
    return PlainEngine(make_stage(config), config, CPU)


def micros_of(engine: PlainEngine, step: int = 0, rows: int = ROWS) -> list[JointBatch]:
    assert isinstance(engine.stage, JointStage)
    return [engine.stage.prepare(part, TRAINED) for part in packed_batch(step).micro_batches(rows)]


def state_of(engine: PlainEngine) -> dict[str, torch.Tensor]:
    return {
        f"{kind}:{fragment.name}": tensor.clone()
        for fragment in engine.fragments(owned=True)
        for kind, tensor in fragment.tensors.items()
    }


@contextmanager
def poisoned(engine: PlainEngine) -> Iterator[None]:
    """The gradient of the embedding is NaN."""
    hook = engine.stage.model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    yield
    hook.remove()


def test_a_step_is_the_step_written_out_by_hand() -> None:
    """Means over the global batch, clipping by the global norm, then AdamW with two kinds of groups."""
    engine = engine_of(clip=0.5)
    stage = make_stage(run_config())
    parameters = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    (micro,) = micros_of(engine)
    load = torch.full((3, 8), 1 / 8)
    sums = stage(micro, load).sums_J
    counts = [int((micro.labels_BT >= 0).sum()), len(micro.masked_P), int(micro.valid_N.sum())]
    loss = sums[0] / counts[0] + sums[1] / counts[1] + 0.01 * sums[2] / counts[2] + 0.001 * sums[3] / counts[2]
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

    result = engine.train_step([micro], {"all": 1e-2})

    assert result.applied
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.5
    for name, parameter in parameters.items():
        gradient = gradients[name] * 0.5 / norm
        decayed = parameter * (1 if name.endswith(("norm.weight", "bias")) else 1 - 1e-2 * 0.1)
        # After one step from zero moments Adam's update is g / (|g| + eps).
        wanted = decayed - 1e-2 * gradient / (gradient.abs() + 1e-8)
        reached = engine.named[name]
        # Gradients of rounding noise make whole steps; they are few.
        sure = gradient.abs() > 1e-6
        assert relative(reached[sure], wanted[sure]) < 1e-4, name


def run(precision: str, micro_rows: int, steps: int = 3) -> tuple[PlainEngine, list[StepResult]]:
    engine = engine_of(precision=precision, eps=1e-5)
    return engine, [engine.train_step(micros_of(engine, step, micro_rows), {"all": 1e-2}) for step in range(steps)]


@pytest.mark.parametrize("micro_rows", [1, 2])
@pytest.mark.slow
def test_accumulation_changes_nothing(micro_rows: int) -> None:
    (whole, expected), (split, actual) = run("float32", ROWS), run("float32", micro_rows)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.totals.sums_J.tolist() == pytest.approx(theirs.totals.sums_J.tolist(), rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert torch.equal(mine.expert_counts_ME, theirs.expert_counts_ME)
    state = state_of(whole)
    assert max(relative(tensor, state[name]) for name, tensor in state_of(split).items()) < 2e-5


@pytest.mark.slow
def test_bfloat16_sums_the_gradients_of_micro_batches_in_float32() -> None:
    """Sixteen equal parts of a gradient add up exactly; a sum in bfloat16 would round the later ones away."""
    norms = []
    for times in (1, 16):
        engine = engine_of(precision="bfloat16")
        norms.append(engine.train_step(micros_of(engine, rows=1)[:1] * times, {"all": 0.0}).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_float32_masters_move_where_bfloat16_weights_could_not() -> None:
    """At a learning rate of 3e-5 most bfloat16 weights cannot move at all: half an ulp of them is more than that."""
    engine = engine_of(precision="bfloat16", lr=3e-5, weight_decay=0.0)
    model = dict(engine.stage.model.named_parameters())
    assert {parameter.dtype for parameter in model.values()} == {torch.bfloat16}
    before = {name: master.detach().clone() for name, master in engine.masters.items()}
    rounded = {name: model[name].detach().clone() for name in before}
    engine.train_step(micros_of(engine), {"all": 3e-5})
    reached = [name for name, moments in state_of_moments(engine).items() if bool((moments != 0).all())]
    assert len(reached) > 20
    moved = torch.cat([(engine.masters[name] != before[name]).flatten() for name in reached])
    assert moved.float().mean().item() > 0.99
    moved_low = torch.cat([(model[name] != rounded[name]).flatten() for name in reached])
    assert moved_low.float().mean().item() < 0.6
    for name, master in engine.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(model[name], master.detach().to(torch.bfloat16))


def test_a_bfloat16_step_in_portions_is_the_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for elements in (1 << 24, 5000):
        monkeypatch.setattr(plain, "_PORTION_ELEMENTS", elements)
        engine = engine_of(precision="bfloat16", clip=0.1)
        for step in range(2):
            engine.train_step(micros_of(engine, step), {"all": 1e-2})
        states.append(state_of(engine))
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def state_of_moments(engine: PlainEngine) -> dict[str, torch.Tensor]:
    return {fragment.name: fragment.tensors["exp_avg"] for fragment in engine.fragments(owned=True)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_bad_gradient_is_skipped_and_training_goes_on(precision: str) -> None:
    engine = engine_of(precision=precision, balancing="bias")
    engine.train_step(micros_of(engine, 0), {"all": 1e-2})
    before, routing = state_of(engine), {name: t.clone() for name, t in engine.routing_state().items()}
    with poisoned(engine):
        result = engine.train_step(micros_of(engine, 1), {"all": 1e-2})
    assert (result.applied, result.reason) == (False, "non-finite gradient norm")
    after = state_of(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(engine.routing_state()[name], tensor) for name, tensor in routing.items())
    healthy = engine.train_step(micros_of(engine, 1), {"all": 1e-2})
    assert healthy.applied
    # Nothing of the bad gradients is left: the same as if that step had never been tried.
    twin = engine_of(precision=precision, balancing="bias")
    twin.train_step(micros_of(twin, 0), {"all": 1e-2})
    assert twin.train_step(micros_of(twin, 1), {"all": 1e-2}).grad_norm == healthy.grad_norm


def test_a_bad_loss_is_skipped_too() -> None:
    engine = engine_of()
    with torch.no_grad():
        engine.stage.model.lm_head.output.bias[3] = float("inf")
    before = state_of(engine)
    result = engine.train_step(micros_of(engine), {"all": 1e-2})
    assert (result.applied, result.reason) == (False, "non-finite loss")
    after = state_of(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fragments_are_the_trained_parameters_exactly_once() -> None:
    engine = engine_of()
    names = [fragment.name for fragment in engine.fragments(owned=True)]
    trained = {name: p for name, p in engine.stage.model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trained)
    for fragment in engine.fragments(owned=True):
        assert fragment.start == 0
        assert torch.equal(fragment.tensors["weight"], trained[fragment.name].detach().flatten())
        assert {kind: tensor.numel() for kind, tensor in fragment.tensors.items()} == dict.fromkeys(
            ("weight", "exp_avg", "exp_avg_sq"), trained[fragment.name].numel()
        )
    assert not any(name.startswith("memory_attention") for name in names)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.slow
def test_fragments_are_the_engine_s_own_storage(precision: str) -> None:
    """Loading is writing into fragments: another engine then goes on exactly as the first."""
    first, second = engine_of(precision=precision), engine_of(precision=precision)
    for step in range(2):
        first.train_step(micros_of(first, step), {"all": 1e-2})
    saved = state_of(first)
    for fragment in second.fragments(owned=False):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(saved[f"{kind}:{fragment.name}"])
    second.finish_load(2, first.routing_state())
    for step in (2, 3):
        expected, actual = (each.train_step(micros_of(each, step), {"all": 1e-2}) for each in (first, second))
        assert torch.equal(actual.totals.sums_J, expected.totals.sums_J)
    state = state_of(second)
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(first).items())


def test_evaluation_changes_nothing_and_repeats_itself() -> None:
    engine = engine_of()
    assert isinstance(engine.stage, JointStage)
    micros = [engine.stage.prepare(part, None) for part in packed_batch().micro_batches(2)]
    before = state_of(engine)
    first = engine.evaluate(micros)
    assert torch.equal(engine.evaluate(micros).sums_J, first.sums_J)
    after = state_of(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in engine.stage.parameters())


def test_evaluation_records_no_graph_and_is_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = engine_of(), []
    forward = JointStage.forward

    def watched(stage: JointStage, *arguments: object) -> object:
        seen.append((torch.is_grad_enabled(), stage.training))
        return forward(stage, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(JointStage, "forward", watched)
    engine.evaluate(micros_of(engine))
    engine.train_step(micros_of(engine), {"all": 1e-2})
    assert seen == [(False, False), (True, True)]
