"""Reading run files: joining, overrides, numbers, and what a person is told when something is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rxt_dist.config.clean import NearDuplicateConfig
from rxt_dist.config.load import load_data, load_model, load_run, resolved_yaml, training_hash
from rxt_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "run/demo.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "run").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_every_run_file_survives_being_written_and_read(path: Path, tmp_path: Path) -> None:
    config = load_run(path)
    (tmp_path / "run.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert load_run(tmp_path / "run.yaml") == config


def test_what_stands_twice_is_written_twice(tmp_path: Path) -> None:
    """And not as an alias, which a person who edits one of them would change both by."""
    file = tmp_path / "run.yaml"
    demo = (CONFIGS / "run/demo.yaml").read_text(encoding="utf-8")
    file.write_text(demo, encoding="utf-8")
    share = "{weights: &shares {en: 1, pl: 1}}"
    phases = f"data.mixture=[{{tokens: 409600, {share[1:-1]}}}, {{weights: *shares}}]"
    written = resolved_yaml(load_run(CONFIGS / "run/demo.yaml", [phases]))
    assert not re.search(r"[&*]id\d", written)
    assert written.count("pl: 1") == 2


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_loads(path: Path) -> None:
    assert load_model(path).name == path.stem


def test_rxt_beta_is_the_published_plan() -> None:
    config = load_run(CONFIGS / "run/rxt-beta.yaml")
    assert (config.train.total_tokens, config.data.seq_len, config.cluster.ranks) == (400_000_000_000, 8192, 64)
    assert (config.stage.memory_noise.at(0), config.stage.memory_noise.at(400_000_000_000)) == (0.5, 1.0)
    assert config.stage.memory_masking.at(200_000_000_000) == pytest.approx(0.325)
    assert (config.parallel.zero, config.parallel.expert_parallel) == (3, config.cluster.gpus_per_node) == (3, 8)


def test_the_two_topologies_of_rxt_beta_differ_in_nothing_else() -> None:
    split, whole = (load_run(CONFIGS / f"run/{name}.yaml") for name in ("rxt-beta", "rxt-beta-zero1"))
    assert (whole.parallel.zero, whole.parallel.expert_parallel) == (1, 1)
    assert whole.model_copy(update={"name": split.name, "parallel": split.parallel}) == split


@pytest.mark.parametrize("text", ["1e6", "1000000", "1_000_000", "1.0e+6", "+1E6", "1000000.0"])
def test_whole_numbers_may_be_written_as_people_write_them(text: str) -> None:
    assert load_run(DEMO, [f"train.total_tokens={text}"]).train.total_tokens == 1_000_000


def test_overrides_apply_in_order_after_joining() -> None:
    overrides = ["model.vocab_size=5000", "optimizer.lr=3e-4", "data.path=shards/", "model.vocab_size=6000"]
    config = load_run(DEMO, [*overrides, "train.ramp={start_tokens: 2048, increment_tokens: 2048, over_tokens: 1e5}"])
    assert (config.model.vocab_size, config.optimizer.lr, config.data.path) == (6000, 3e-4, Path("shards"))
    assert config.train.ramp is not None
    assert config.train.ramp.over_tokens == 100_000


def test_an_override_may_name_another_file_to_join() -> None:
    config = load_run(DEMO, [f"model={CONFIGS / 'model/rxt-alpha-nano.yaml'}", "model.vocab_size=8000"])
    assert (config.model.name, config.model.vocab_size) == ("rxt-alpha-nano", 8000)


def test_a_language_code_is_no_truth_value() -> None:
    config = load_run(DEMO, ["data.mixture=[{weights: {no: 1, pl: 2}}]"])
    assert config.data.mixture[0].weights == {"no": 1.0, "pl": 2.0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.totl_tokens=3", "unknown key 'train.totl_tokens'. Did you mean 'train.total_tokens'?"),
        ("train.lr=3e-4", "unknown key 'train.lr'. Did you mean 'optimizer.lr'?"),
        ("model.moe.experts=8", "Did you mean 'model.decoder.moe'?"),
        ("data.mixture=[{wieghts: {}}]", "Did you mean 'data.mixture.0.weights'?"),
        ("train.total_tokens=many", "'train.total_tokens' cannot be \"many\": it should be a valid integer (Token"),
        ("train.total_tokens=1.5", "cannot be 1.5: it should be a valid integer"),
        ("train.total_tokens=true", "cannot be true: it should be a valid integer"),
        ("train.recompute=1", "cannot be 1: it should be a valid boolean"),
        ("train.precision=fp8", "it should be 'float32' or 'bfloat16'"),
        ("parallel.zero=4", "it should be 0, 1, 2 or 3"),
        ("optimizer.lr=.inf", "it should be a finite number"),
        ("optimizer.lr=.nan", "it should be a finite number"),
        ("optimizer.lr=-1", "it should be greater than 0"),
        ("optimizer.no_decay=norm", "it should be a list"),
        ("train=3", "'train' cannot be 3: it should be a mapping"),
        ("optimizer.lr.peak=3", "'optimizer.lr' is the single value 0.004, so 'optimizer.lr.peak' does not exist"),
        ("train.total_tokens", "an override has the form a.b=value"),
        ("=3", "an override has the form a.b=value"),
        ("train.ramp={start_tokens: ", "the value is not valid YAML"),
        ("train.ramp={a: 1, a: 2}", "'a' is given twice"),
        ("model=configs/model/dmo.yaml", "there is no file configs/model/dmo.yaml. Did you mean 'demo.yaml'?"),
        ("train.ramp={}", "'train.ramp.start_tokens' is missing and has no default"),
    ],
)
def test_a_wrong_override_is_named(override: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    message = refusal(DEMO, override)
    assert message.startswith(f"override '{override}'")
    assert said in message


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_wrong_file_is_named_with_its_line(tmp_path: Path) -> None:
    model = write(tmp_path, "name: x\ndim: 128\nlayres: 4\n", "model.yaml")
    run = write(tmp_path, "name: x\nmodel: model.yaml\ntrain:\n  total_tokens: none\nexperts: 3\n")
    message = refusal(run)
    assert f"{model}:3: unknown key 'model.layres'. Did you mean 'model.layers'?" in message
    assert f"{model}:1: 'model.heads' is missing and has no default: set it (Heads H" in message
    assert f"{run}:4: 'train.total_tokens' cannot be \"none\"" in message
    assert f"{run}:3: 'train.global_batch_tokens' is missing" in message
    assert f"{run}:5: unknown key 'experts'. Did you mean 'model.decoder.moe.experts'?" in message
    assert f"{run}:1: 'data' is missing" in message


def test_what_a_class_checks_itself_is_named_with_its_line(tmp_path: Path) -> None:
    text = (CONFIGS / "model/demo.yaml").read_text(encoding="utf-8").replace("experts: 16", "experts: 1")
    line = next(index for index, part in enumerate(text.splitlines(), 1) if "experts: 1," in part)
    with pytest.raises(ConfigError, match=rf"model.yaml:{line}: in 'decoder.moe', active \(2\) must not exceed"):
        load_model(write(tmp_path, text, "model.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nseed: 1\nname: b\n", ":3: 'name' is given twice, first at "),
        ("train:\n  total_tokens: 1\n  total_tokens: 2\n", ":3: 'train.total_tokens' is given twice"),
        ("name: [a\n", ":2: this is not valid YAML"),
        ("name: !!python/name:os.system\n", ":1: '' is read as !!python/name:os.system and is none"),
        ("- a\n- b\n", "the configuration cannot be"),
        ("", "'name' is missing"),
        ("model: absent.yaml\n", ":1: there is no file"),
        ("model: .\n", "it is a directory"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(str(path))
    assert said in message


def test_a_file_that_is_not_there_suggests_its_neighbour() -> None:
    assert "Did you mean 'demo.yaml'?" in refusal(CONFIGS / "run/dem.yaml")


def test_hashes_tell_what_changed() -> None:
    config = load_run(DEMO)
    free = ["parallel.zero=1", "train.micro_batch_rows=2", "train.recompute=true", "cluster.nodes=2", "data.path=moved"]
    elsewhere = load_run(DEMO, free)
    assert training_hash(elsewhere) == training_hash(config)
    assert training_hash(load_run(DEMO, ["optimizer.beta2=0.9"])) != training_hash(config)


def test_near_duplicates_as_a_switch_are_refused_with_the_way_to_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    for value in ("true", "false"):
        path.write_text(f"path: x\nbuild:\n  clean:\n    near_duplicates: {value}\n")
        with pytest.raises(ConfigError, match=r"near_duplicates: \{\}` drops near-duplicates with the defaults"):
            load_data(path)
    path.write_text("path: x\nbuild:\n  clean:\n    near_duplicates: {}\n")
    build = load_data(path).build
    assert build is not None
    assert build.clean.near_duplicates == NearDuplicateConfig()
