"""Chains of runs as configuration: what a file says of each run, whose weights each takes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rxt_dist.config.chain import Chain, DataJob, is_chain, load_chain
from rxt_dist.config.load import load_run, training_hash
from rxt_dist.errors import ConfigError

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"


def chain_file(folder: Path, links: dict[str, Any], **rest: Any) -> Path:
    path = folder / "chain.yaml"
    path.write_text(
        yaml.safe_dump({"name": "chain", "output": str(folder / "runs"), "links": links, **rest}, sort_keys=False)
    )
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run files of the stages, named by their kinds."""
    demo = yaml.safe_load(DEMO.read_text())
    for kind in ("joint", "mlm", "decoder", "decoder-sft", "sft", "memory", "smat"):
        content = demo | {"name": kind, "stage": {"kind": kind}}
        for key in ("model", "data", "cluster"):
            content[key] = str(DEMO.parent / demo[key])
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def chain_of(folder: Path, *kinds: str, **links: Any) -> Chain:
    return load_chain(chain_file(folder, {kind: {"run": f"{kind}.yaml"} for kind in kinds} | links))


def starts(chain: Chain, name: str) -> list[tuple[str, tuple[str, ...]]]:
    start = chain.runs[name].start
    return [(origin.run.name if origin.run else "", origin.parts) for origin in start.origins] if start else []


def refusal(folder: Path, links: dict[str, Any], *overrides: str, **rest: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_chain(chain_file(folder, links, **rest), list(overrides))
    return str(caught.value)


def test_each_part_comes_from_the_last_link_that_has_it(runs: Path) -> None:
    chain = chain_of(runs, "joint", "sft", "memory", "smat")
    assert starts(chain, "joint") == []
    assert starts(chain, "sft") == [("joint", ("embedding", "decoder", "lm_head", "encoder", "mlm_head"))]
    assert starts(chain, "memory") == [("sft", ("embedding", "encoder"))]
    assert starts(chain, "smat") == [
        ("memory", ("embedding", "encoder", "memory_attention")),
        ("sft", ("decoder", "lm_head")),
    ]
    assert [link.origins for link in chain.links] == [(), ("joint",), ("sft",), ("memory", "sft")]
    mini = chain_of(runs, "mlm", "decoder", "decoder-sft", "memory")
    assert starts(mini, "decoder") == [("mlm", ("embedding",))]
    assert starts(mini, "decoder-sft") == [("decoder", ("embedding", "decoder", "lm_head"))]
    assert starts(mini, "memory") == [("decoder-sft", ("embedding",)), ("mlm", ("encoder",))]


def test_a_run_file_says_which_parts_and_the_chain_whose(runs: Path) -> None:
    content = yaml.safe_load((runs / "sft.yaml").read_text())
    start = {"run": "runs/elsewhere", "parts": ["decoder", "lm_head"], "unfinished": True}
    (runs / "sft.yaml").write_text(yaml.safe_dump(content | {"start": start}))
    chain = chain_of(runs, "joint", "sft")
    assert starts(chain, "sft") == [("joint", ("decoder", "lm_head"))]
    assert chain.runs["sft"].start is not None
    first = chain_of(runs, "sft", "memory")
    assert starts(first, "sft") == [("elsewhere", ("decoder", "lm_head"))], "nothing is before it"
    (runs / "sft.yaml").write_text(yaml.safe_dump(content | {"start": {"export": "x", "parts": ["decoder"]}}))
    kept = chain_of(runs, "joint", "sft").runs["sft"].start
    assert kept is not None
    assert kept.export == Path("x")


@pytest.mark.parametrize("key", ["parts", "also", "fresh"])
def test_a_null_in_a_start_is_as_if_left_out(key: str, runs: Path) -> None:
    content = yaml.safe_load((runs / "sft.yaml").read_text())
    (runs / "sft.yaml").write_text(yaml.safe_dump(content | {"start": {"run": "x", key: None}}))
    chain = chain_of(runs, "joint", "sft")
    assert starts(chain, "sft") == [("joint", ("embedding", "decoder", "lm_head", "encoder", "mlm_head"))]


def test_a_chain_may_say_where_a_link_begins(runs: Path) -> None:
    links = {
        "joint": {"run": "joint.yaml"},
        "sft": {"run": "sft.yaml", "start": None},
        "memory": {
            "run": "memory.yaml",
            "start": {"link": "joint", "parts": ["embedding"], "also": [{"link": "sft", "parts": ["encoder"]}]},
        },
    }
    chain = load_chain(chain_file(runs, links))
    assert starts(chain, "sft") == []
    assert starts(chain, "memory") == [("joint", ("embedding",)), ("sft", ("encoder",))]


def test_common_settings_are_laid_over_files_and_those_of_a_link_over_them(runs: Path) -> None:
    links = {"joint": {"run": "joint.yaml"}, "sft": {"run": "sft.yaml", "set": {"optimizer": {"lr": 0.5}}}}
    common = {"optimizer": {"lr": 0.25, "clip": 2.0}, "data": {"max_epochs": 7}}
    path = chain_file(runs, links, common=common)
    chain = load_chain(path)
    found = {name: (run.optimizer.lr, run.optimizer.clip, run.data.max_epochs) for name, run in chain.runs.items()}
    assert found == {"joint": (0.25, 2.0, 7), "sft": (0.5, 2.0, 7)}
    assert chain.runs["joint"].data.seq_len == 256, "what nobody mentions stays"
    changed = load_chain(path, ["common.optimizer.lr=0.125", "sft.seed=9", f"output={runs}/other"]).runs
    assert (changed["joint"].optimizer.lr, changed["sft"].optimizer.lr) == (0.125, 0.5)
    assert (changed["joint"].seed, changed["sft"].seed) == (0, 9)
    assert changed["sft"].directory == runs / "other/sft"
    assert changed["sft"].start is not None
    assert changed["sft"].start.run == runs / "other/joint"


def test_a_model_file_in_common_replaces_the_run_s_own(runs: Path) -> None:
    """It is relative to the chain's file; in an override to the current directory."""
    nano = DEMO.parents[1] / "model/rxt-alpha-nano.yaml"
    (runs / "nano.yaml").write_text(nano.read_text())
    path = chain_file(runs, {"joint": {"run": "joint.yaml"}}, common={"model": "nano.yaml"})
    assert load_chain(path).runs["joint"].model.name == "rxt-alpha-nano"
    mini = DEMO.parents[1] / "model/rxt-beta-micro.yaml"
    assert load_chain(path, [f"common.model={mini}"]).runs["joint"].model.name == "rxt-beta-micro"
    assert load_chain(path, [f"joint.model={mini}"]).runs["joint"].model.name == "rxt-beta-micro"


def test_a_run_may_stand_in_the_chain(runs: Path) -> None:
    content = yaml.safe_load((runs / "joint.yaml").read_text())
    chain = load_chain(chain_file(runs, {"inline": {"run": content}}))
    again = load_run(runs / "joint.yaml")
    assert training_hash(chain.runs["inline"]) == training_hash(again)


def test_data_jobs_stand_among_the_runs(runs: Path) -> None:
    job = {"data": ["build", "corpus", "--out", ".demo/shards"], "makes": ".demo/shards"}
    chain = load_chain(chain_file(runs, {"texts": job, "joint": {"run": "joint.yaml"}}))
    assert chain.links[0].work == DataJob(("build", "corpus", "--out", ".demo/shards"), Path(".demo/shards"))
    assert list(chain.awaited_jobs("joint")) == ["texts"]
    other = load_chain(chain_file(runs, {"joint": {"run": "joint.yaml"}, "texts": job}))
    assert not other.awaited_jobs("joint"), "what comes later makes nothing for it"
    away = load_chain(chain_file(runs, {"texts": job | {"makes": ".demo/sh"}, "joint": {"run": "joint.yaml"}}))
    assert not away.awaited_jobs("joint")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"link": "sft", "parts": ["decoder"]}, "'sft', which comes after it, so that neither could begin"),
        ({"link": "again", "parts": ["decoder"]}, "itself: name a link before it"),
        (
            {"link": "jont", "parts": ["decoder"]},
            "'jont', which is no link: they are texts, joint, again, sft. Did you mean 'joint'?",
        ),
        ({"link": "texts", "parts": ["decoder"]}, "'texts', which makes data"),
        ({"link": None, "parts": ["decoder"]}, "None, which is no name"),
        ({"link": ["joint"], "parts": ["decoder"]}, "['joint'], which is no name"),
        ({"link": "joint", "run": "x", "parts": ["decoder"]}, "'joint' and of a run or export in one place"),
    ],
)
def test_a_link_begins_with_a_run_before_it(start: Any, said: str, runs: Path) -> None:
    links = {
        "texts": {"data": ["build"], "makes": "x"},
        "joint": {"run": "joint.yaml"},
        "again": {"run": "joint.yaml", "set": {"name": "again"}, "start": start},
        "sft": {"run": "sft.yaml"},
    }
    text = refusal(runs, links)
    assert said in text
    assert "chain.yaml:" in text


def test_a_directory_of_a_later_link_is_a_circle_too(runs: Path) -> None:
    start = {"run": str(runs / "runs/sft"), "parts": ["decoder"]}
    text = refusal(runs, {"joint": {"run": "joint.yaml", "start": start}, "sft": {"run": "sft.yaml"}})
    assert "link 'joint' begins with the weights of" in text
    assert "which link 'sft' trains, so that neither could begin" in text
    own = {"run": str(runs / "runs/joint"), "parts": ["decoder"]}
    assert "which link 'joint' trains" in refusal(runs, {"joint": {"run": "joint.yaml", "start": own}})


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ({"joint": {}}, "a link needs one of run and data"),
        ({"joint": {"run": "joint.yaml", "data": ["x"], "makes": "y"}}, "a link needs one of run and data"),
        ({"texts": {"data": ["build"]}}, "data and makes belong together"),
        ({"texts": {"data": ["build"], "makes": "x", "set": {"a": 1}}}, "set and start belong to a run"),
        ({"texts": {"data": ["build"], "makes": "x"}}, "links names no run"),
        ({"common": {"run": "joint.yaml"}}, "'common' cannot be the name of a link"),
        ({"a.b": {"run": "joint.yaml"}}, "'a.b' cannot be the name of a link"),
        ({"joint": {"run": "jiont.yaml"}}, "chain.yaml:"),
        ({"joint": {"run": "joint.yaml", "sett": {}}}, "unknown key 'links.joint.sett'"),
        (
            {"joint": {"run": "joint.yaml"}, "again": {"run": "joint.yaml"}},
            "link 'joint' and link 'again' have one folder",
        ),
        (
            {"joint": {"run": "joint.yaml", "set": {"name": "chain"}}},
            "the chain itself and link",
        ),
        ({"joint": {"run": "joint.yaml", "set": {"optimizer": {"lrr": 1}}}}, "unknown key 'optimizer.lrr'"),
        ({"joint": {"run": "joint.yaml", "set": {"train": {"total_tokens": -1}}}}, "'train.total_tokens' cannot be -1"),
    ],
)
def test_mistakes_are_told_with_their_place(links: Any, said: str, runs: Path) -> None:
    text = refusal(runs, links)
    assert said in text
    if "unknown key" in said or "cannot be -1" in said:
        assert "chain.yaml:" in text


def test_a_run_in_the_place_of_a_chain_is_told_so(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"joint.yaml is a run and no chain of runs: use `rxt-dist train"):
        load_chain(runs / "joint.yaml")


def test_a_chain_is_told_from_a_run(runs: Path) -> None:
    assert is_chain(chain_file(runs, {"joint": {"run": "joint.yaml"}}))
    assert not is_chain(runs / "joint.yaml")
    assert not is_chain(runs)
