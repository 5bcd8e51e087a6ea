"""Checking, mending and comparing datasets of interactions and of dialogues, from the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_verbs import as_json, run

from data_prep.corpora import Document
from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.data.dialogues import DialogueDataset, load_dialogue_manifest
from rxt_dist.data.sealing import SPARE_FILE, sealed_json
from rxt_dist.data.verify import verify_full, verify_quick
from rxt_dist.errors import ConfigError, DataError

KINDS = ("single", "dialogues")


def _request(root: Path, kind: Any) -> InteractionRequest:
    return InteractionRequest((root / f"records/{kind}.jsonl",), root / kind, root / "tokenizer.json", 128, kind)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of each kind, with its records and tokenizer."""
    root = tmp_path_factory.mktemp("interactions")
    records = [{"query": f"How much is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    (root / "records").mkdir()
    (root / "records/single.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    talks = [{"interactions": records[n : n + 3]} for n in range(0, 60, 2)]
    (root / "records/dialogues.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks))
    save_tokenizer(train_tokenizer([Document(json.dumps(records), "en", "en", "")], 300), root / "tokenizer.json")
    for kind in KINDS:
        build_interactions(_request(root, kind))
    return root


def _copy_inputs(world: Path, to: Path) -> None:
    shutil.copytree(world / "records", to / "records")
    shutil.copy(world / "tokenizer.json", to)


@pytest.fixture(params=KINDS)
def dataset(request: pytest.FixtureRequest, world: Path, tmp_path: Path) -> Path:
    """A copy of one of them, which lies beside its records."""
    _copy_inputs(world, tmp_path)
    return Path(shutil.copytree(world / request.param, tmp_path / request.param))


def _files(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not path.name.startswith("."))


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_sound_one_is_sound(dataset: Path) -> None:
    for mode in ("--full", "--quick", "--repair"):
        value = as_json("verify", dataset, mode)
        assert (value["damaged"], value["unknown"], value["unsealed"]) == ({}, [], False)
        assert value["files"] == len(_files(dataset))
    assert {SPARE_FILE, "interactions.json", "build.json", "units/u00000.json"} <= set(_files(dataset))
    told = run("verify", dataset)
    assert "is sound" in told.stdout
    assert "earlier version" not in told.stdout


@pytest.mark.slow
def test_one_flipped_bit_in_any_file_is_found(dataset: Path) -> None:
    names = _files(dataset)
    for name in names:
        path = dataset / name
        before, bits = path.read_bytes(), 8 * path.stat().st_size
        for bit in {0, bits // 3, bits // 2 + 5, bits - 1}:
            _flip(path, bit)
            assert name in {finding.file for finding in verify_full(dataset).findings}, (name, bit)
            if not name.endswith(".arrow"):
                assert verify_quick(dataset).findings, (name, bit)
            path.write_bytes(before)
    assert verify_full(dataset).findings == ()


def test_small_files_come_back_from_their_copies(dataset: Path) -> None:
    before = {name: (dataset / name).read_bytes() for name in _files(dataset)}
    for name in before:
        if name.endswith(".arrow"):
            continue
        _flip(dataset / name, 4 * len(before[name]))
        value = as_json("verify", dataset, "--repair")
        assert (name in value["restored"], value["damaged"]) == (True, {}), name
        assert (dataset / name).read_bytes() == before[name], name


def test_a_damaged_shard_is_built_again_as_the_message_says(dataset: Path) -> None:
    shard = next(dataset.rglob("train/*.arrow"))
    before = shard.read_bytes()
    _flip(shard, 4 * len(before))
    for arguments in (("verify", dataset), ("verify", dataset, "--repair")):
        result = run(*arguments)
        assert isinstance(result.exception, DataError)
        said = str(result.exception)
        advice = "elete what is damaged of its shards and run the same `rxt-dist data interactions` again"
        assert advice in said
        assert "texts. " not in said
        assert "data build" not in said
        if "--repair" in arguments:
            assert f"{shard.relative_to(dataset).as_posix()} cannot be built again: it was not built from texts" in said
    damaged = {finding.file for finding in verify_full(dataset).findings}
    assert damaged == {shard.relative_to(dataset).as_posix()}
    shard.unlink()
    build_interactions(_request(dataset.parent, dataset.name))
    assert shard.read_bytes() == before
    assert as_json("verify", dataset)["damaged"] == {}


def test_a_manifest_lost_in_both_copies_is_made_again(dataset: Path) -> None:
    before = (dataset / "dataset.json").read_bytes()
    _flip(dataset / "dataset.json", 900)
    (dataset / SPARE_FILE).unlink()
    error = run("verify", dataset, "--repair").exception
    assert isinstance(error, DataError)
    assert "Run the same `rxt-dist data interactions` again: it writes both anew" in str(error)
    build_interactions(_request(dataset.parent, dataset.name))
    assert (dataset / "dataset.json").read_bytes() == before
    assert as_json("verify", dataset)["damaged"] == {}


def test_an_unfinished_one_names_its_own_command(dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    (dataset / SPARE_FILE).unlink()
    error = run("verify", dataset).exception
    assert isinstance(error, DataError)
    assert "run the same `rxt-dist data interactions` again to finish it" in str(error)


def test_deep_says_that_there_is_nothing_to_trace(dataset: Path) -> None:
    error = run("verify", dataset, "--deep", 3).exception
    assert isinstance(error, ConfigError)
    assert "made by `rxt-dist data interactions`, which does not keep where its inputs lie" in str(error)


def test_a_shard_with_another_number_of_dialogues_is_found(world: Path, tmp_path: Path) -> None:
    """Wrong numbers with right hashes: a manifest that was made wrongly, and sealed."""
    root = Path(shutil.copytree(world / "dialogues", tmp_path / "data"))
    manifest = load_dialogue_manifest(root)
    source = manifest.sources[0]
    shard = replace(source.train.shards[0], dialogues=source.train.shards[0].dialogues + 1)
    wrong = replace(manifest, sources=(replace(source, train=replace(source.train, shards=(shard,))),))
    (root / "dataset.json").write_bytes(sealed_json(wrong.to_dict()))
    found = {finding.file: finding.problem for finding in verify_full(root).findings}
    assert found[shard.file] == f"holds {shard.dialogues - 1} dialogues instead of {shard.dialogues}"


def _as_earlier(root: Path) -> None:
    """Make it what earlier versions wrote: no copies, and a manifest that knows of no other files."""
    manifest = load_dialogue_manifest(root).to_dict()
    del manifest["files"]
    (root / "dataset.json").write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    (root / SPARE_FILE).unlink()


def test_dialogues_of_an_earlier_version_are_checked_as_far_as_that_goes(world: Path, tmp_path: Path) -> None:
    _copy_inputs(world, tmp_path)
    root = Path(shutil.copytree(world / "dialogues", tmp_path / "dialogues"))
    _as_earlier(root)
    assert len(DialogueDataset(root)) == len(DialogueDataset(world / "dialogues"))
    value = as_json("verify", root)
    assert (value["damaged"], value["unknown"], value["unsealed"]) == ({}, [], True)
    assert "nothing vouches for the other files. Run the same `rxt-dist data interactions`" in " ".join(
        run("verify", root).stdout.split()
    )
    shard = next(root.rglob("train/*.arrow"))
    for path in (shard, root / "tokenizer.json", root / "dataset.json"):
        before = path.read_bytes()
        # A digit of the manifest, and a letter of a token.
        at = before.index(b'"tokens": ') + 10 if path.name == "dataset.json" else len(before) // 2
        _flip(path, 8 * at)
        assert path.relative_to(root).as_posix() in {finding.file for finding in verify_full(root).findings}, path
        path.write_bytes(before)
    result = build_interactions(_request(tmp_path, "dialogues"))
    assert (result.units_kept, as_json("verify", root)["unsealed"]) == (1, False)
    assert (root / "dataset.json").read_bytes() == (world / "dialogues/dataset.json").read_bytes()


@pytest.mark.parametrize("verb", ["repack", "export-megatron"])
def test_other_verbs_say_what_dialogues_are(world: Path, tmp_path: Path, verb: str) -> None:
    more = {"repack": ("--seq-len", 64, "--out", tmp_path / "out"),
            "export-megatron": ("--out", tmp_path / "out")}.get(verb, ())  # fmt: skip
    error = run(verb, world / "dialogues", *more).exception
    assert isinstance(error, DataError)
    assert "holds dialogues, made for the memory stages by `rxt-dist data interactions --kind dialogues`" in str(error)
    assert not (tmp_path / "out").exists()


def test_differences_of_dialogues(world: Path, tmp_path: Path) -> None:
    root = world / "dialogues"
    same = as_json("diff", root, shutil.copytree(root, tmp_path / "copy"))
    assert (same["same"], same["documents"]["same"]) == (True, True)
    _copy_inputs(world, tmp_path)
    records = tmp_path / "records/dialogues.jsonl"
    records.write_text(records.read_text().split("\n", 1)[1])
    build_interactions(_request(tmp_path, "dialogues"))
    result = run("diff", root, tmp_path / "dialogues")
    assert result.exit_code == 65
    assert "dialogues of en/train: " in result.stdout
    assert "they differ in en/train" in result.stdout
    other = as_json("diff", root, world / "single", code=65)
    assert [item["what"] for item in other["differences"]] == ["kind"]
    for pair in ((root, world / "single"), (world / "single", root)):
        refused = run("diff", *pair, "--documents").exception
        assert isinstance(refused, ConfigError)
        assert f"compares the documents of rows, but {root} holds dialogues" in str(refused)


def test_dialogues_of_equal_totals_cannot_be_compared_further(world: Path, tmp_path: Path) -> None:
    _copy_inputs(world, tmp_path)
    records = tmp_path / "records/dialogues.jsonl"
    records.write_text("\n".join(reversed(records.read_text().split("\n"))))
    build_interactions(_request(tmp_path, "dialogues"))
    result = run("diff", world / "dialogues", tmp_path / "dialogues")
    assert result.exit_code == 65
    assert "Whether they are the same ones the manifests do not say." in result.stdout
    assert "--documents" not in result.stdout
