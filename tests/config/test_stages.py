"""The stage of a run: chosen by kind, checked by its own class; and the start from other weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, PositiveInt

from rxt_dist.config import stages
from rxt_dist.config.load import load_run, resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig, run_class
from rxt_dist.config.stages import ALL, JointConfig, LinearSchedule, StageConfig, StageEntry
from rxt_dist.config.validate import validate_run
from rxt_dist.errors import ConfigError

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"
# training_hash of configs/run/demo.yaml as of the last commit before stages had classes of their own (5f52963).
DEMO_HASH = "8e0e5bf58c566541577e832e5aac1a683b01415290db3dcb65ce5a3ef98e4b8c"
START = "start={run: runs/other, parts: [embedding, decoder]}"


def run_file(tmp_path: Path, stage: str) -> Path:
    """The demo with this text in place of its stage."""
    before, _, after = DEMO.read_text().partition("stage:\n")
    rest = after[after.index("train:\n") :]
    joined = before.replace("../", f"{DEMO.parent.parent}/")
    path = tmp_path / "run.yaml"
    path.write_text(joined + stage + rest)
    return path


def line_of(path: Path, text: str) -> int:
    return path.read_text().split("\n").index(text) + 1


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value)


class OtherConfig(StageConfig):
    """A second stage, with settings of its own of which one has no default."""

    kind: Literal["other"] = Field("other", description="Which stage.")
    depth: PositiveInt = Field(description="How deep it goes.")

    def parts(self) -> Any:
        return ("embedding", "decoder", "lm_head", "memory_attention")


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in set(stages.STAGES) - {"joint"}:
        monkeypatch.delitem(stages.STAGES, kind)  # Other tests may have added some.
    monkeypatch.setitem(stages.STAGES, "other", StageEntry(OtherConfig, "nowhere:Other"))
    run_class.cache_clear()
    yield
    run_class.cache_clear()


@pytest.mark.parametrize(("kind", "meant"), [("jiont", "joint"), ("Joint", "joint"), ("othr", "other")])
def test_an_unknown_kind_is_refused_with_the_stages_that_there_are(
    two_stages: None, tmp_path: Path, kind: str, meant: str
) -> None:
    path = run_file(tmp_path, f"stage:\n  weights: {{ar: 2}}\n  kind: {kind}\n")
    line = line_of(path, f"  kind: {kind}")
    said = f"{path}:{line}: 'stage.kind' is \"{kind}\", but the stages are joint, other. Did you mean '{meant}'?"
    assert refusal(path) == said


def test_a_kind_may_come_from_an_override(two_stages: None, tmp_path: Path) -> None:
    path = run_file(tmp_path, "")
    config = load_run(path, ["stage={kind: other, depth: 3}"])
    assert config.stage == OtherConfig(depth=3)
    assert "override 'stage.kind=nothing'" in refusal(DEMO, "stage.kind=nothing")
    for value in ("3", "[joint]", "null"):
        assert "but the stages are joint, other." in refusal(DEMO, f"stage.kind={value}")


def test_a_run_without_a_stage_is_joint(tmp_path: Path) -> None:
    assert load_run(run_file(tmp_path, "")).stage == JointConfig()
    assert load_run(run_file(tmp_path, "stage:\n  weights: {ar: 2}\n")).stage.kind == "joint"


def test_a_stage_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = run_file(tmp_path, "stage: joint\n")
    line = line_of(path, "stage: joint")
    assert refusal(path).startswith(f"{path}:{line}: 'stage' cannot be \"joint\": it should be a mapping")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("  memory_nois: {start: 0, end: 1}", "unknown key 'stage.memory_nois'. Did you mean 'stage.memory_noise'?"),
        ("  mlm_probability: 2", "'stage.mlm_probability' cannot be 2: it should be less than or equal to 1 (Share"),
        ("  lr: 1e-3", "unknown key 'stage.lr'. Did you mean 'optimizer.lr'?"),
        (
            "  memory_masking: {start: 0.1, end: 1.5}",
            "memory_masking.end (1.5) is a probability and must not exceed 1.",
        ),
        ("  weights: {ar: 1, blance: 2}", "unknown key 'stage.weights.blance'. Did you mean 'stage.weights.balance'?"),
        ("  memory_noise: {start: 1}", "'stage.memory_noise.end' is missing and has no default"),
    ],
)
def test_a_mistake_in_a_stage_is_told_by_its_own_path_and_line(tmp_path: Path, wrong: str, said: str) -> None:
    path = run_file(tmp_path, f"stage:\n  kind: joint\n{wrong}\n")
    text = refusal(path)
    line = line_of(path, "stage:" if "memory_masking" in wrong else wrong)
    assert text.startswith(f"{path}:{line}: "), text
    assert said in text
    assert "\n" not in text, "one mistake, one line"


def test_a_stage_is_read_by_its_own_class_and_by_no_other(two_stages: None, tmp_path: Path) -> None:
    path = run_file(tmp_path, "stage:\n  kind: other\n  depth: 2\n  mlm_probability: 0.1\n")
    line = line_of(path, "  mlm_probability: 0.1")
    assert refusal(path).startswith(f"{path}:{line}: unknown key 'stage.mlm_probability'.")
    path = run_file(tmp_path, "stage:\n  kind: other\n  dept: 2\n")
    first, second = refusal(path).split("\n")
    assert "'stage.depth' is missing and has no default: set it (How deep it goes)." in first
    assert f"{path}:{line_of(path, '  dept: 2')}: unknown key 'stage.dept'. Did you mean 'stage.depth'?" in second


def test_what_is_resolved_holds_the_settings_of_the_stage_and_is_read_back(two_stages: None, tmp_path: Path) -> None:
    config = load_run(run_file(tmp_path, "stage: {kind: other, depth: 2}\n"))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(config))
    assert "depth: 2" in resolved.read_text()
    again = load_run(resolved)
    assert again.stage == OtherConfig(depth=2)
    assert training_hash(again) == training_hash(config) != training_hash(load_run(resolved, ["stage.depth=3"]))


def test_a_stage_refuses_a_model_without_its_parts(two_stages: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 'joint' needs the encoder, but model .*: add model\.encoder or"):
        validate_run(load_run(DEMO, ["model.encoder=null", "model.memory_attention=null"]), 1, None)
    other = run_file(tmp_path, "stage: {kind: other, depth: 2}\n")
    validate_run(load_run(other), 1, None)
    with pytest.raises(ConfigError, match=r"stage 'other' needs the memory attention.*: add model\.memory_attention"):
        validate_run(load_run(other, ["model.memory_attention=null"]), 1, None)


def test_a_stage_that_learns_nothing_is_refused() -> None:
    overrides = ["stage.weights.ar=0", "stage.weights.mlm=0"]
    with pytest.raises(ConfigError, match=r"stage\.weights\.ar and stage\.weights\.mlm are both 0"):
        validate_run(load_run(DEMO, overrides), 1, None)
    validate_run(load_run(DEMO, overrides[:1]), 1, None)


def test_joint_trains_all_that_it_builds_at_one_rate() -> None:
    config = JointConfig()
    assert "memory_attention" not in config.parts()
    assert config.rate_group("decoder.layers.0.feed_forward.up.weight") == ALL


def test_a_schedule_is_a_line_and_then_stays() -> None:
    line = LinearSchedule(start=1.0, end=0.0, tokens=100)
    assert [line.at(tokens) for tokens in (0, 25, 99, 100, 1000)] == pytest.approx([1, 0.75, 0.01, 0, 0])
    assert LinearSchedule(start=1.0, end=0.5).at(0) == 0.5


@pytest.mark.parametrize(
    "start", ["{parts: [decoder]}", "{run: a, export: b, parts: [decoder]}", "{run: null, parts: [decoder]}"]
)
def test_a_start_needs_exactly_one_origin(start: str) -> None:
    assert "in 'start', start needs one of run and export." in refusal(DEMO, f"start={start}")


def test_a_start_names_parts_of_the_network() -> None:
    assert "start.parts is empty, so nothing would be taken" in refusal(DEMO, "start={run: a}")
    assert "start.parts is empty" in refusal(DEMO, "start={run: a, parts: []}")
    assert "'start.parts.0' cannot be \"decodr\"" in refusal(DEMO, "start={run: a, parts: [decodr]}")


def test_a_start_takes_no_part_that_the_stage_does_not_build() -> None:
    said = r"start\.parts names 'memory_attention', but stage 'joint' builds embedding, decoder, .*: leave it out\."
    with pytest.raises(ConfigError, match=said):
        validate_run(load_run(DEMO, ["start={run: a, parts: [decoder, memory_attention]}"]), 1, None)
    validate_run(load_run(DEMO, ["start={run: a, parts: [decoder]}"]), 1, None)


def hash_of(*overrides: str) -> str:
    return training_hash(load_run(DEMO, overrides))


def test_runs_of_earlier_versions_have_the_hash_that_they_had() -> None:
    """Else no run that was begun before could be resumed."""
    config: RunConfig = load_run(DEMO)
    assert config.start is None
    assert training_hash(config) == DEMO_HASH


def test_where_the_weights_come_from_may_move_but_not_which_parts_they_are() -> None:
    begun = hash_of(START)
    assert begun != DEMO_HASH
    assert begun == hash_of(START, "start.run=elsewhere/other")
    assert begun == hash_of("start={export: exported, parts: [embedding, decoder]}")
    assert begun != hash_of(START, "start.parts=[embedding]")


MEMORY = "stage={kind: memory}"
FROM_ELSEWHERE = "start={run: a, parts: [embedding, encoder]}"


@pytest.mark.parametrize(
    ("start", "lacking"),
    [
        ("start=null", "embedding, encoder"),
        ("start={run: a, parts: [embedding]}", "encoder"),
        ("start={fresh: [encoder]}", "embedding"),
        ("start={run: a, parts: [memory_attention], fresh: [embedding]}", "encoder"),
    ],
)
def test_a_stage_that_builds_on_trained_parts_needs_them_or_a_word(start: str, lacking: str) -> None:
    config = load_run(DEMO, [MEMORY, start])
    with pytest.raises(ConfigError, match=rf"`start` takes no {lacking}: .*start\.fresh=\[{lacking}\]\."):
        validate_run(config, 2, None)


@pytest.mark.parametrize("start", [FROM_ELSEWHERE, "start={fresh: [embedding, encoder]}"])
def test_trained_parts_may_come_from_elsewhere_or_be_fresh_by_a_word(start: str) -> None:
    validate_run(load_run(DEMO, [MEMORY, start]), 2, None)


@pytest.mark.parametrize("kind", ["decoder", "decoder-sft"])
def test_an_embedding_that_stays_is_a_trained_one_or_fresh_by_a_word(kind: str) -> None:
    """What begins at random and never trains would be read by every layer above it."""
    stage = f"stage={{kind: {kind}}}"
    with pytest.raises(ConfigError, match=r"`start` takes no embedding: .*start\.fresh=\[embedding\]\."):
        validate_run(load_run(DEMO, [stage, "start={run: a, parts: [decoder, lm_head]}"]), 2, None)
    for other in ("start={run: a, parts: [embedding]}", "start={fresh: [embedding]}", "stage.train_embedding=true"):
        validate_run(load_run(DEMO, [stage, other]), 2, None)


def test_no_part_is_named_twice_in_a_start() -> None:
    twice = "start={run: a, parts: [decoder, encoder], also: [{run: b, parts: [encoder]}]}"
    assert "encoder is named twice" in refusal(DEMO, twice)
    assert "encoder is named twice" in refusal(DEMO, "start={run: a, parts: [encoder], fresh: [encoder]}")
    assert "start.also.0 needs one of run and export" in refusal(
        DEMO, "start={run: a, parts: [decoder], also: [{parts: [encoder]}]}"
    )


def test_where_weights_come_from_is_no_part_of_what_training_depends_on() -> None:
    def hash_of(*overrides: str) -> str:
        return training_hash(load_run(DEMO, list(overrides)))

    one = hash_of("start={run: a, parts: [encoder]}")
    assert one == hash_of("start={run: b, parts: [encoder], unfinished: true, fresh: [decoder]}")
    assert one != hash_of("start={run: a, parts: [encoder], also: [{run: b, parts: [decoder]}]}")
    assert hash_of() == hash_of("start={fresh: [encoder]}")
