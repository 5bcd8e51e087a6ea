"""The verbs of the later stages' data and of interchange, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_verbs import as_json, run
from tokenizers import Tokenizer
from training_run import TinyRun

from rxt_dist.config.load import load_run
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.train.preflight import preflight


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    as_json("sample", root / "corpus", "--megabytes", 0.12, "--interactions", root / "chats")
    as_json("tokenizer", root / "corpus", "--out", root / "tokenizer.json", "--vocab-size", 600)
    return root


def _interactions(root: Path, kind: str, *more: object) -> tuple[object, ...]:
    tokenizer, out = root / "tokenizer.json", root / f"out-{kind}"
    return ("interactions", root / "chats" / kind, "--kind", kind, "--tokenizer", tokenizer, "--seq-len", 96,
            "--out", out, *more)  # fmt: skip


def test_the_sample_writes_records_beside_texts(root: Path) -> None:
    texts = sorted(path.relative_to(root).as_posix() for path in (root / "corpus").rglob("*") if path.is_file())
    assert "corpus/en/dialogues.jsonl" in texts
    assert not any("single" in name for name in texts)
    value = as_json("sample", root / "again", "--megabytes", 0.12, "--interactions", root / "chats2", "--seed", 0)
    assert set(value["interactions"]["files"]) == {
        f"{kind}/{language}.jsonl" for kind in ("single", "dialogues") for language in ("en", "pl")
    }
    refused = run("sample", root / "third", "--interactions", root / "chats")
    assert isinstance(refused.exception, DataError)
    assert not (root / "third").exists()


def test_single_interactions_from_records_to_a_decoded_row(root: Path) -> None:
    built = as_json(*_interactions(root, "single"))
    assert set(built["sources"]) == {"en", "pl"}
    for source in built["sources"].values():
        assert 0.3 < source["targets"] / source["tokens"] < 0.8
    assert built["read"]["records"] == sum(source["interactions"] for source in built["sources"].values())
    again = as_json(*_interactions(root, "single"))
    assert (again["units_kept"], again["root_digest"]) == (1, built["root_digest"])
    row = as_json("show", root / "out-single", "--position", 0)
    assert all(document["text"].startswith("[BOS][") for document in row["documents"])
    assert run("verify", root / "out-single").exit_code == 0


def test_a_tokenizer_that_cuts_fills_or_draws_lots_changes_nothing(root: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding(length=120)
    stated = tmp_path / "stated.json"
    tokenizer.save(str(stated))
    verbs: dict[str, tuple[object, ...]] = {
        "interactions": (root / "chats/dialogues", "--kind", "dialogues", "--seq-len", 512),
        "build": (root / "corpus", "--seq-len", 64, "--workers", 1),
    }
    for verb, arguments in verbs.items():
        digests = [
            as_json(verb, *arguments, "--tokenizer", file, "--out", tmp_path / verb / file.stem)["root_digest"]
            for file in (root / "tokenizer.json", stated)
        ]
        assert digests[0] == digests[1]
    content = json.loads(stated.read_text())
    content["model"]["dropout"] = 0.1
    stated.write_text(json.dumps(content))
    for verb, arguments in verbs.items():
        refused = run(verb, *arguments, "--tokenizer", stated, "--out", tmp_path / verb / "random")
        assert isinstance(refused.exception, DataError)
        assert "at random" in str(refused.exception)


def test_pretraining_refuses_interactions(root: Path, tmp_path: Path) -> None:
    as_json(*_interactions(root, "single"))
    run = TinyRun(tmp_path, root / "out-single")
    config = load_run(run.file, ["model.seq_len=96", "train.global_batch_tokens=768", "train.total_tokens=7680"])
    with pytest.raises(DataError, match="holds interactions, of which only the answers carry loss"):
        preflight(config, 1)


def test_pretraining_says_what_dialogues_are(root: Path, tmp_path: Path) -> None:
    as_json(*_interactions(root, "dialogues", "--out", tmp_path / "dialogues"))
    config = load_run(TinyRun(tmp_path, tmp_path / "dialogues").file)
    with pytest.raises(DataError, match="holds dialogues, made for the memory stages by `rxt-dist data interactions"):
        preflight(config, 1)


def test_dialogues_and_what_a_person_is_told(root: Path) -> None:
    result = run(*_interactions(root, "dialogues"))
    assert result.exit_code == 0, result.exception
    text = " ".join(result.stdout.split())
    assert "with loss" in text
    assert "0 of 1 units were already finished" in text
    records = sum(len(path.read_text().splitlines()) for path in (root / "chats/dialogues").glob("*"))
    assert f"Read {records:,} records" in text
    dataset = root / "out-dialogues"
    assert sum(len(DialogueDataset(dataset, split)) for split in ("train", "eval")) == records


def test_a_bad_record_ends_the_build_with_its_place(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"query": "q", "answer": "a"}\n{"query": ["q"], "answer": "a"}\n')
    refused = run("interactions", tmp_path / "x.jsonl", "--tokenizer", root / "tokenizer.json", "--seq-len", 64,
                   "--out", tmp_path / "out")  # fmt: skip
    assert isinstance(refused.exception, DataError)
    assert "x.jsonl, line 2: 'query' is a list, not text" in str(refused.exception)
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_mixed_file_is_shared_between_the_two_kinds(root: Path, tmp_path: Path) -> None:
    singles = [{"query": f"How much is {n}?", "answer": f"It is {n}."} for n in range(30)]
    records = [item if n % 3 else {"interactions": [item, item]} for n, item in enumerate(singles)]
    records.append({"query": "nobody answers", "answer": ""})
    (tmp_path / "mixed.en.jsonl").write_text("\n".join(json.dumps(record) for record in records))

    def arguments(kind: str, out: str, *more: object) -> tuple[object, ...]:
        return ("interactions", tmp_path / "mixed.en.jsonl", "--kind", kind, "--tokenizer", root / "tokenizer.json",
                "--seq-len", 64, "--out", tmp_path / out, *more)  # fmt: skip

    refused = run(*arguments("single", "single"))
    assert isinstance(refused.exception, DataError)
    assert "line 1 is a dialogue of 2 interactions" in str(refused.exception)
    assert "--skip-other-kinds" in str(refused.exception)
    # The build that was refused goes on with it.
    single = as_json(*arguments("single", "single", "--skip-other-kinds"))
    assert (single["read"]["other_kind"], single["read"]["empty"], single["sources"]["en"]["interactions"]) == (
        10,
        1,
        20,
    )
    told = " ".join(run(*arguments("single", "single", "--skip-other-kinds")).stdout.split())
    assert "Read 30 records with 40 interactions. Skipped 1 empty, 10 dialogues, 0 too long" in told
    assert json.loads((tmp_path / "single/interactions.json").read_text())["counts"]["other_kind"] == 10
    dialogues = as_json(*arguments("dialogues", "dialogues", "--skip-other-kinds"))
    assert (dialogues["read"]["other_kind"], dialogues["sources"]["en"]["dialogues"]) == (20, 10)
    assert dialogues["sources"]["en"]["interactions"] == 20
    refused = run(*arguments("dialogues", "dialogues"))
    assert isinstance(refused.exception, DataError)
    assert "skip_other_kinds was True" in str(refused.exception)
    both = as_json(*arguments("dialogues", "both"))
    assert (both["read"]["other_kind"], both["sources"]["en"]["dialogues"]) == (0, 30)
    assert "skip_other_kinds" not in json.loads((tmp_path / "both/build.json").read_text())


def test_each_interaction_of_a_dialogue_by_itself(root: Path, tmp_path: Path) -> None:
    """The same interactions as if each had stood in a line of its own."""
    turns = [{"query": f"How much is {n}?", "answer": f"It is {n}."} for n in range(12)]
    (tmp_path / "apart.jsonl").write_text("\n".join(json.dumps(turn) for turn in turns))
    asking = turns[4] | {"recall": {"distance": 2, "value": "4"}}
    grouped = [{"interactions": [*turns[:4], asking]}, turns[5], {"interactions": turns[6:]}]
    (tmp_path / "grouped.jsonl").write_text("\n".join(map(json.dumps, grouped)))

    def arguments(file: str, *more: object) -> tuple[object, ...]:
        return ("interactions", tmp_path / f"{file}.jsonl", "--tokenizer", root / "tokenizer.json", "--seq-len", 64,
                "--out", tmp_path / file, *more)  # fmt: skip

    apart = as_json(*arguments("apart"))
    split = as_json(*arguments("grouped", "--split-dialogues"))
    assert split["sources"] == apart["sources"]
    difference = as_json("diff", tmp_path / "apart", tmp_path / "grouped", "--documents", code=65)
    assert difference["documents"]["same"]
    for more in (("--kind", "dialogues"), ("--skip-other-kinds",)):
        refused = run(*arguments("other", "--split-dialogues", *more))
        assert isinstance(refused.exception, ConfigError)
        assert not (tmp_path / "other").exists()


def test_nothing_of_the_kind_is_said_to_be_there(root: Path, tmp_path: Path) -> None:
    refused = run("interactions", root / "chats/dialogues", "--tokenizer", root / "tokenizer.json", "--seq-len", 512,
                  "--skip-other-kinds", "--out", tmp_path / "out")  # fmt: skip
    assert isinstance(refused.exception, DataError)
    assert " of the other kind, 0 too long for rows of 512" in str(refused.exception)
    assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.slow
def test_to_megatron_and_back(root: Path, tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "data", root / "tokenizer.json"
    as_json("build", root / "corpus", "--out", out, "--tokenizer", tokenizer, "--workers", 1)
    exported = as_json("export-megatron", tmp_path / "data", "--out", tmp_path / "m/corpus")["corpora"]
    assert {(item["source"], item["split"]) for item in exported.values()} == {
        ("en", "train"), ("en", "eval"), ("pl", "train"), ("pl", "eval"),
    }  # fmt: skip
    prefix = tmp_path / "m/corpus-pl-train"
    arguments = ("import-megatron", prefix, "--tokenizer", root / "tokenizer.json", "--seq-len", 64,
                 "--out", tmp_path / "back")  # fmt: skip
    back = as_json(*arguments)
    assert "corpus-pl-train.rxt.json: train of source pl (pl)" in back["naming"]
    assert list(back["sources"]) == ["pl"]
    totals = back["sources"]["pl"]
    assert sum(totals[split]["tokens"] for split in ("train", "eval")) == exported[str(prefix)]["tokens"]
    assert back["read"]["bos"] == back["read"]["eod"] == exported[str(prefix)]["documents"]
    shard = next((tmp_path / "back/pl/train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[::-1])
    damaged = run("verify", tmp_path / "back")
    assert "and run the same `rxt-dist data import-megatron` again" in str(damaged.exception)
    shard.unlink()
    assert as_json(*arguments)["root_digest"] == back["root_digest"]
    assert run("verify", tmp_path / "back").exit_code == 0
    told = run(*arguments)
    assert "1 of 1 units were already finished" in " ".join(told.stdout.split())
    shown = run("export-megatron", tmp_path / "back", "--out", tmp_path / "m/again")
    assert "again-pl-train" in shown.stdout.replace("\n", "")
    refused = run("import-megatron", tmp_path / "none", "--tokenizer", root / "tokenizer.json", "--seq-len", 64,
                   "--out", tmp_path / "o")  # fmt: skip
    assert "none.bin does not exist" in str(refused.exception)
