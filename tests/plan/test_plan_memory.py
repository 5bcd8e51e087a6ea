"""Memory of a GPU under each setting, against sums done by hand and against what training allocates."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import make_stage
from training_work import peak_of_a_step, saved_bytes

from rxt_dist.config.load import load_run
from rxt_dist.config.stages import MemoryStageConfig, Turns
from rxt_dist.plan.activations import backward_passes, kept_memories_bytes, memory_bytes
from rxt_dist.plan.memory import Memory, memory_per_gpu, moments
from rxt_dist.plan.setting import Setting, run_parameters

RUNS = Path(__file__).parents[2] / "configs/run"
BETA = RUNS / "rxt-beta-zero1.yaml"
DENSE, ROUTED = 221_317_120, 2_717_908_992
# One MoE layer: routers and experts, two shared experts with their gate, two global biases.
LAYER = 384 * (512 + 3 * 512 * 192) + 512 + 2 * (3 * 512 * 192) + 2 * 512 + 512


def setting(*overrides: str) -> Setting:
    return Setting.of(load_run(BETA, overrides))


def memory(*overrides: str, zero: int) -> Memory:
    return memory_per_gpu(setting(*overrides).with_(zero=zero))


def test_trained_parameters_share_the_embedding_and_leave_out_the_memory_attention() -> None:
    built = run_parameters(load_run(BETA))
    assert (built.dense, built.routed) == (DENSE, ROUTED)
    assert (built.frozen_dense, built.frozen_routed) == (0, 0)
    assert DENSE + ROUTED == 2_841_937_920 + 96_958_976 + 33_883_648 - 65_536 * 512
    assert sum(dense for dense, _ in built.by_layer.values()) == DENSE
    assert sum(routed for _, routed in built.by_layer.values()) == ROUTED


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 4, 12), (1, 2, 4, 12 / 64), (2, 2, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_memory_of_each_stage(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    found = memory(zero=stage)
    total = DENSE + ROUTED
    assert found.weights == pytest.approx(total * weights)
    assert found.gradients == pytest.approx(total * gradients)
    assert found.optimizer == pytest.approx(total * optimizer)
    assert found.items()["total_estimate"] == found.total == sum(asdict(found).values())


def test_expert_parallelism_divides_experts_over_fewer_copies() -> None:
    found = memory("parallel.expert_parallel=8", zero=1)
    assert found.weights == pytest.approx(2 * (DENSE + ROUTED / 8))
    assert found.optimizer == pytest.approx(12 * (DENSE / 64 + ROUTED / 8 / 8), abs=1)


def test_recomputation_stores_less() -> None:
    kept, recomputed = memory("train.recompute=false", zero=1), memory("train.recompute=true", zero=1)
    assert kept.activations > 10 * recomputed.activations
    assert recomputed.passing > kept.passing


def test_float32_weights_are_their_own_masters() -> None:
    found = memory("train.precision=float32", zero=0)
    states = [part / (DENSE + ROUTED) for part in (found.weights, found.gradients, found.optimizer)]
    assert states == pytest.approx([4, 4, 8])


def test_what_a_rank_takes_beside_its_share() -> None:
    """Two layers gathered where there is something to gather, and of the layer at work its gradients with a copy."""
    found = memory(zero=3)
    assert found.gathered == pytest.approx(2 * 2 * LAYER, rel=0.01)
    assert memory("train.micro_batch_rows=1", zero=3).passing > (2 + 4) * LAYER
    assert (found.process, found.heap) == (400_000_000, 0)
    assert found.buffers == 2 * 4 * 2**24
    alone = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallel.expert_parallel=1"]
    assert memory(*alone, zero=3).gathered == 0
    assert memory(*alone, zero=0).buffers == 0


def test_a_tenth_of_a_gpu_is_left() -> None:
    found = replace(memory(zero=3), process=0)
    assert found.fits(found.total / 1e9 / 0.9 * 1.001)
    assert not found.fits(found.total / 1e9 / 0.9 * 0.999)


SMALL = ("model.seq_len=512", "data.seq_len=512", "parallel={engine: plain, zero: 0}", "train.global_batch_tokens=1024")
CASES = {
    "as it is": (),
    "recomputed": ("train.recompute=true",),
    "many layers": ("model.layers=6", "model.memory_attention=null"),
    "no gates, no shared experts": (
        *("model.decoder.self_attention.gated=false", "model.encoder.attention.gated=false"),
        *("model.decoder.moe.shared_experts=0", "model.decoder.moe.shared_hidden=0"),
    ),
    "wide experts": ("model.decoder.moe={experts: 8, active: 4, hidden: 256}", "model.decoder.stateless_before=[moe]"),
    "large vocabulary": ("model.vocab_size=32768",),
}


def small(*overrides: str) -> Setting:
    fixed = ("cluster.gpus_per_node=1", "train.micro_batch_rows=2", *SMALL, *overrides)
    return Setting.of(load_run(RUNS / "demo.yaml", fixed))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_what_a_micro_batch_stores_is_what_autograd_keeps(name: str) -> None:
    """Within two percent: the tables of positions and the bounds of documents are in no plan."""
    own = small(*CASES[name])
    stage = make_stage(own.config)
    planned = sum(layer.stored for layer in backward_passes(own)[0])
    assert saved_bytes(stage, own) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_peak_of_a_step_is_as_planned(name: str) -> None:
    """All that torch allocates in a step, over what the engine holds between steps."""
    own = small(*CASES[name])
    found = memory_per_gpu(own)
    planned = found.gradients + found.activations + found.logits + found.passing
    assert peak_of_a_step(own) == pytest.approx(planned, rel=0.1)


ATTENTION = "attention: {query_heads: 4, kv_heads: 2}"
DIALOGUES = {
    "seven turns": (),
    "one turn": ("stage.turns=1", "train.global_batch_tokens=128"),
    "more slots than tokens": ("model.stm_slots=192",),
    "slots that only read": (f"model.memory_attention={{variant: simple, {ATTENTION}}}",),
    "one mean, a status that is learnt": (
        f"model.memory_attention={{variant: self-interlayer, {ATTENTION}, gate: {{kind: linear, status: linear}}}}",
    ),
    "no gates": (f"model.memory_attention={{variant: interlayer, {ATTENTION}, gate: {{kind: none}}}}",),
}


def dialogues(name: str) -> Setting:
    """Two dialogues of turns of 64 tokens."""
    own = small("stage={kind: memory, turns: 7}", "data.seq_len=64", "model.stm_slots=32", *DIALOGUES[name])
    return own.with_(micro_rows=2)


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.slow
def test_what_dialogues_store_is_what_autograd_keeps(name: str) -> None:
    """Within two percent, as above: turns stand there together."""
    own = dialogues(name)
    planned = sum(layer.stored for layer in backward_passes(own)[0]) + kept_memories_bytes(own)
    assert saved_bytes(make_stage(own.config), own) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.slow
def test_the_peak_of_a_step_of_dialogues_is_as_planned(name: str) -> None:
    own = dialogues(name)
    found = memory_per_gpu(own)
    planned = found.gradients + found.activations + found.logits + found.passing
    assert peak_of_a_step(own) == pytest.approx(planned, rel=0.1)


class Recomputed(MemoryStageConfig):
    """Dialogues of which one turn at a time is computed again, from the memory before it."""

    def dialogue(self) -> Turns:
        return Turns(self.turns, 1, memories=1)


def test_turns_that_are_computed_again_leave_one_memory_each() -> None:
    own = dialogues("seven turns")
    again = replace(own, config=own.config.model_copy(update={"stage": Recomputed(kind="memory", turns=7)}))
    (all_turns,), (last, other) = backward_passes(own), backward_passes(again)
    assert len(all_turns) == 7 * len(last) == 7 * len(other)
    # 4 layers of 32 slots of 128, of 2 dialogues and 7 turns.
    assert kept_memories_bytes(again) == 7 * 4 * 2 * 32 * 128 * 4 == kept_memories_bytes(own) / 3


ANSWERED = {
    "turns recomputed": (),
    "two turns": ("stage.turns=2", "train.global_batch_tokens=256"),
    "turns and layers recomputed": ("train.recompute=true",),
    "more slots than tokens": ("model.stm_slots=192", "train.recompute=true"),
    "turns kept": ("stage.recompute_turns=false",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERED)
def test_the_peak_of_a_step_through_the_memory_is_as_planned(name: str) -> None:
    """Whole depth. While a turn is computed again, the gradients of all turns behind it are there."""
    fixed = ("data.seq_len=64", "model.stm_slots=32", "train.global_batch_tokens=896")
    own = small("stage={kind: smat, turns: 7}", *fixed, *ANSWERED[name]).with_(micro_rows=2)
    found = memory_per_gpu(own)
    planned = found.gradients + found.activations + found.logits + found.passing
    assert peak_of_a_step(own) == pytest.approx(planned, rel=0.05)


def test_a_decoder_stores_what_it_reads_of_each_slot_that_dialogues_write() -> None:
    fixed = ("stage={kind: smat, turns: 7}", "data.seq_len=64", "train.global_batch_tokens=896")
    few, many = (
        next(layer.stored for layer in backward_passes(own)[0] if layer.path == "decoder.layers.1")
        for own in (small(*fixed, f"model.stm_slots={slots}").with_(micro_rows=2) for slots in (32, 192))
    )
    # The normed memory and its statistic, keys and values of two heads of 16, of the slots of two dialogues.
    assert many - few == 2 * 160 * (128 + 1 + 2 * 2 * 16) * 4


def test_gradients_that_turns_share_are_divided_after_the_last() -> None:
    """ZeRO-3 divides a gradient once autograd has summed it over all turns: until then each rank has all of it."""
    several, one = (dialogues(name).with_(zero=3) for name in ("seven turns", "one turn"))
    most, least = (max(moment.passing for moment in moments(each)[1:-1]) for each in (several, one))
    assert most - least == pytest.approx(4 * several.built.dense, rel=0.01)
    assert all(moment.gradients == 4 * several.built.dense for moment in moments(several))


def test_a_row_of_turns_counts_as_all_of_them() -> None:
    own = small("stage={kind: memory, turns: 4}", "data.seq_len=64", "train.global_batch_tokens=1024")
    assert (own.rows, own.tokens, own.accumulation) == (4, 128, 2)


def test_the_memory_of_the_decoder_is_counted_where_there_is_one() -> None:
    assert memory_bytes(small()) == 4 * 2 * 512 * 128 * 4
