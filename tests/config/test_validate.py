"""Checks between model, data, batch and ranks: each names the values that would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import extended  # noqa: F401  (stages that only tests have)
import pytest

from rxt_dist.config.load import load_run
from rxt_dist.config.model import PartName
from rxt_dist.config.run import RunConfig, StartConfig
from rxt_dist.config.stages import JointConfig
from rxt_dist.config.validate import DataFacts, settle_topology, validate_run
from rxt_dist.errors import ConfigError, ExitCode

RUNS = Path(__file__).parents[2] / "configs/run"
FACTS = DataFacts(seq_len=256, row_tokens=256, vocab_size=4096, sources=("en", "pl"), tokenizer_sha="0" * 64)
# Figures that the cases below are about, whatever the demo itself is tuned to.
BASE = ["train.global_batch_tokens=4096", "train.total_tokens=1_228_800", "schedule.warmup_tokens=100_000"]
RAMP = "train.ramp={{start_tokens: {}, increment_tokens: {}, over_tokens: 1e5}}"


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (2, [], 2),
        (1, [], 1),
        (4, [], 2),  # Two ranks a node: experts stay inside one.
        (8, ["cluster.gpus_per_node=8"], 8),
        (6, ["cluster.gpus_per_node=6"], 2),
        (2, ["model.decoder.moe.bias=local"], 2),
        (2, ["parallel.expert_parallel=1"], 1),
    ],
)
def test_expert_parallel_0_means_what_a_node_allows(world_size: int, overrides: list[str], expected: int) -> None:
    config = settle_topology(demo(overrides), world_size)
    assert config.parallel.expert_parallel == expected


class LaterLayersOnly(JointConfig):
    """A stage that leaves the first layer as it is."""

    def rate_group(self, parameter: str) -> str | None:
        return None if parameter.startswith("decoder.layers.0.") else super().rate_group(parameter)


def test_a_stage_may_train_the_experts_of_some_layers_only() -> None:
    config = demo(["parallel.expert_parallel=0"])
    config = config.model_copy(update={"stage": LaterLayersOnly()})
    assert settle_topology(config, 2).parallel.expert_parallel == 2


ALONE = ["parallel.expert_parallel=1", "train.micro_batch_rows=1"]


def demo(overrides: list[str]) -> RunConfig:
    """The demo with the base figures."""
    return load_run(RUNS / "demo.yaml", [*BASE, *overrides])


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_fits_its_cluster(path: Path) -> None:
    config = load_run(path)
    validate_run(config, config.cluster.ranks, None)


@pytest.mark.parametrize("model", ["rxt-alpha-nano", "rxt-alpha-mini", "rxt-beta-micro", "rxt-beta"])
def test_experts_of_every_published_model_can_be_split(model: str) -> None:
    shape = f"model={RUNS.parent}/model/{model}.yaml"
    # Mini has no encoder.
    stage = "lm" if model == "rxt-alpha-mini" else "joint"
    validate_run(demo([shape, "parallel.expert_parallel=2", f"stage={{kind: {stage}}}"]), 2, None)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, []),
        (4, ["parallel.expert_parallel=4", "train.micro_batch_rows=1"]),
        (1, ["parallel.expert_parallel=1"]),
        (1, ["parallel.engine=plain", "parallel.zero=0", "parallel.expert_parallel=1", "train.micro_batch_rows=16"]),
        (2, ["data.mixture=[{tokens: 1_048_576, weights: {en: 1}}, {weights: {en: 1, pl: 2}}]"]),
        (2, [RAMP.format(2048, 2048)]),
        (2, ["schedule={kind: wsd, warmup_tokens: 1e5, decay_tokens: 2e5}"]),
    ],
)
def test_what_works_is_let_through(ranks: int, overrides: list[str]) -> None:
    validate_run(demo(overrides), ranks, FACTS)


@pytest.mark.parametrize(
    ("ranks", "overrides", "said"),
    [
        (3, ["parallel.expert_parallel=3"], "expert_parallel 3 does not divide 16 experts: use 1, 2, 4, 8 or 16."),
        (6, ["parallel.expert_parallel=4"], "expert_parallel 4 does not divide 6 ranks: use 1 or 2, or start a mult"),
        (
            2,
            ["parallel.engine=plain", "parallel.expert_parallel=2"],
            "2 ranks and zero 3 and expert_parallel 2: start one",
        ),
        (2, ["parallel.engine=plain", "parallel.zero=0"], "but the run has 2 ranks"),
        (
            2,
            ["model.encoder=", "model.memory_attention="],
            "needs the encoder, but model 'demo' has none",
        ),
        (2, ["stage.weights={ar: 0, mlm: 0}"], "are both 0, so nothing is learnt"),
        (2, ["train.total_tokens=4000"], "train.total_tokens (4,000) is less than one step"),
        (2, ["schedule.warmup_tokens=2e6"], "together they may be at most as long as the training"),
        (2, ["schedule.decay_tokens=1e5"], "Remove it or set schedule.kind=wsd"),
        (
            2,
            ["data.mixture=[{weights: {}}]"],
            "a phase needs one of weights, tokens_per_source, languages, by_size, with at least",
        ),
        (2, ["data.mixture=[{weights: {ple: 1}}]"], "names 'ple', but .demo/shards holds en, pl. Did you mean 'pl'?"),
        (2, ["data.mixture=[{weights: {en: 1}}, {weights: {pl: 1}}]"], "data.mixture.0.tokens is not set"),
        (2, ["data.mixture=[{tokens: 1e5, weights: {en: 1}}]"], "lengthen the last phase, or leave out its tokens"),
        (2, ["data.seq_len=128"], "but the rows in .demo/shards have 256 tokens: set data.seq_len=256"),
        (2, ["model.vocab_size=4095"], "set model.vocab_size=4096 or more"),
        (2, ["model.seq_len=128"], "set model.seq_len=256, or take data with shorter rows"),
        (2, ["train.global_batch_tokens=4000"], "is not a whole number of rows of 256 tokens: use 3840 or 4096"),
        (
            2,
            ["train.micro_batch_rows=5"],
            "set train.global_batch_tokens to 2560 or 5120, or train.micro_batch",
        ),
        (6, [], "16 rows of 256 tokens, which 6 ranks cannot share"),
        (2, ["train.ramp={start_tokens: 2048, increment_tokens: 2048, over_tokens: 100}"], "less than one row of 256"),
        (2, [RAMP.format(8192, 2048)], "the ramp enlarges the batch, so start with less"),
        (1, [*ALONE, RAMP.format(1024, 2048)], "use an increment that divides 3,072."),
        (2, [RAMP.format(4096, 2048)], "is not below train.global_batch_tokens (4,096)"),
        (2, [RAMP.format(1024, 2048)], "train.ramp.start_tokens is 4 rows"),
        (2, [RAMP.format(2048, 256)], "train.ramp.increment_tokens is 1 rows"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(ranks: int, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_run(demo(overrides), ranks, FACTS)
    assert said in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG


def test_the_advice_works() -> None:
    config = load_run(RUNS / "demo.yaml", ["train.global_batch_tokens=5120", "train.micro_batch_rows=5"])
    validate_run(config, 2, FACTS)


def test_row_length_comes_from_the_data_where_the_run_leaves_it_open() -> None:
    config = load_run(RUNS / "demo.yaml", ["data.seq_len="])
    validate_run(config, 2, FACTS)
    with pytest.raises(ConfigError, match="rows of 384 tokens are longer than"):
        validate_run(config, 2, replace(FACTS, seq_len=384))


def test_a_ramp_that_never_reaches_its_batch_is_refused_before_rows_are_known() -> None:
    with pytest.raises(ConfigError, match="use an increment that divides 3,072"):
        validate_run(demo([*ALONE, "data.seq_len=null", RAMP.format(1024, 1000, 1e5)]), 1, None)


def test_all_parts_of_a_start_that_the_stage_does_not_build_are_named() -> None:
    class DecoderAlone(JointConfig):
        def parts(self) -> tuple[PartName, ...]:
            return ("embedding", "decoder")

    start = StartConfig(run=Path("runs/first"), parts=("memory_attention", "decoder", "encoder"))
    config = demo(ALONE).model_copy(update={"start": start, "stage": DecoderAlone()})
    with pytest.raises(ConfigError, match=r"names 'memory_attention', 'encoder', but stage 'joint' builds .*them out"):
        validate_run(config, 1, None)
