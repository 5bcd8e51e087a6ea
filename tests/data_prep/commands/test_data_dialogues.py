"""The verbs that look at datasets, of dialogues: show, stats, mix, verify and diff."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import golden_inputs
import numpy as np
import pytest
from data_verbs import as_json, run

from data_prep.recall.make import RecallRequest, parts
from rxt_dist.config.load import load_run
from rxt_dist.config.schedules import steps
from rxt_dist.data.dialogue_source import DialogueSource
from rxt_dist.data.dialogues import DialogueDataset, load_dialogue_manifest
from rxt_dist.data.verify import verify_full
from rxt_dist.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[3] / "configs"
TURNS, SEQ_LEN = 5, 96


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues in two languages with distances 1 and 3, of six turns at most, and held-out ones of distance 5."""
    root = tmp_path_factory.mktemp("dialogues")
    (root / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    as_json("recall", root / "talks", "--distances", "1,3", "--held-out-distances", "5", "--count", 60,
            "--held-out-count", 8, "--turns", 6, "--variety", "small")  # fmt: skip
    as_json("interactions", root / "talks", "--kind", "dialogues", "--tokenizer", root / "tokenizer.json", "--seq-len",
            SEQ_LEN, "--out", root / "data", "--workers", 1)  # fmt: skip
    return root / "data"


@pytest.fixture(scope="module")
def run_file(dataset: Path) -> Path:
    """Near dialogues for 4,096 positions, then far ones."""
    path = dataset.parent / "run.yaml"
    row = TURNS * SEQ_LEN
    path.write_text(
        f"""
name: shown
seed: 77
model: {CONFIGS}/model/demo.yaml
stage: {{kind: memory, turns: {TURNS}}}
data:
  path: {dataset}
  mixture:
  - {{tokens: {4096 * row}, weights: {{recall-d1-en: 1, recall-d1-pl: 1}}}}
  - {{weights: {{recall-d3-en: 3, recall-d3-pl: 1}}}}
  max_epochs: 1000
train:
  total_tokens: {2 * 4096 * row}
  global_batch_tokens: {8 * row}
parallel: {{engine: plain, zero: 0}}
checkpoint: {{every_tokens: {4096 * row}}}
"""
    )
    return path


def test_it_is_the_dialogue_that_training_reads_in_each_phase_and_epoch(dataset: Path, run_file: Path) -> None:
    source = DialogueSource(load_run(run_file), TURNS)
    seen = []
    for position in (0, 1, 4095, 4096, 8191):
        batch = source.read(np.array([position]), slice(0, 1))
        shown = as_json("show", dataset, "--position", position, "--run", run_file, "--ids")
        read = [turn["ids"] for turn in shown["turns"] if turn["read"]]
        tokens, lengths = batch.tokens_BUT[0].tolist(), batch.lengths_BU[0].tolist()
        assert read == [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
        assert all(turn["turn"] > TURNS for turn in shown["turns"] if not turn["read"])
        for turn, (distance, first, end) in zip(shown["turns"], batch.recalls_BU3[0].tolist(), strict=False):
            told = turn.get("recall", {"distance": 0, "first": 0, "end": 0})
            assert (told["distance"], told["first"], told["end"]) == (distance, first, end)
        seen.append((shown["source"][:9], shown["epoch"] > 0))
    assert seen == [*[("recall-d1", False)] * 2, ("recall-d1", True), ("recall-d3", False), ("recall-d3", True)]


def test_a_step_of_a_run(dataset: Path, run_file: Path) -> None:
    taken = dict(enumerate(steps(load_run(run_file).train, TURNS * SEQ_LEN), start=1))
    for step in (1, 2, 513):
        shown = as_json("show", dataset, "--run", run_file, "--step", step)
        assert (shown["position"], shown["step"]) == (taken[step].first, step)
    second = as_json("show", dataset, "--run", run_file, "--step", 2, "--rank", 1, "--ranks", 2)
    assert second["position"] == taken[2].first + taken[2].rows // 2


@pytest.mark.parametrize("held_out", [False, True])
def test_a_dialogue_by_its_source_and_row(dataset: Path, held_out: bool) -> None:
    name, split = ("recall-d5-pl", "eval") if held_out else ("recall-d3-pl", "train")
    more = ["--held-out"] * held_out
    opened = DialogueDataset(dataset, split, name)
    shown = as_json("show", dataset, "--source", name, "--row", 6, "--ids", *more)
    assert [turn["ids"] for turn in shown["turns"]] == [turn.tolist() for turn in opened.dialogue(6)]
    assert (shown["source"], shown["split"], shown["row"]) == (name, split, 6)
    assert not shown.keys() & {"position", "epoch", "step"}
    text = run("show", dataset, "--source", name, "--row", 6, *more).stdout
    recalls = [turn["recall"] for turn in shown["turns"] if "recall" in turn]
    assert f"Dialogue 6 of {name}/{split} (pl), {len(shown['turns'])} turns of " in text
    assert text.count("--- turn ") == len(shown["turns"]) == text.count("[BOS][Q]") == text.count("[EOS]")
    assert text.count(">>> recalls ") == len(recalls) > 0
    for recall in recalls:
        assert f">>> recalls {recall['value']!r} of turn " in text


def test_a_row_of_documents_by_its_source(tmp_path: Path) -> None:
    from shard_folder import random_corpus, write_folder

    from rxt_dist.data.dataset import TokenDataset

    write_folder(tmp_path / "data", random_corpus(51, units=2, documents=300), 32)
    opened = TokenDataset(tmp_path / "data")
    names = [source.name for source in opened.sources]
    for split, more in (("train", []), ("eval", ["--held-out"])):
        shown = as_json("show", tmp_path / "data", "--source", names[1], "--row", 2, "--ids", *more)
        ids = [token for document in shown["documents"] for token in document["ids"]]
        row = opened.read(split, np.array([1]), np.array([2])).tokens_RT[0].tolist()
        assert ids + [0] * shown["padding"] == row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "recall-d4-en"), "has no source 'recall-d4-en'"),
        (("--source", "recall-d5-en"), "--row is 0, but recall-d5-en/train has 0 rows"),
        (("--source", "recall-d1-en", "--row", 1000), "--row is 1000, but recall-d1-en/train has 5"),
        (("--source", "recall-d1-en", "--position", 1), "--source names a row by itself"),
        (("--position", 1, "--row", 2), "--row and --held-out choose among the rows of a source"),
        (("--position", 1, "--mlm"), "holds dialogues: nothing masks them, and they keep no origin"),
        (("--position", 1, "--trace"), "holds dialogues: nothing masks them, and they keep no origin"),
        ((), "Give either --position or, for a run, --step; or name a row by --source"),
    ],
)
def test_what_show_cannot_be_asked(dataset: Path, arguments: tuple[object, ...], message: str) -> None:
    error = run("show", dataset, *arguments).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_statistics_tell_turns_and_recalls_by_distance(dataset: Path, run_file: Path) -> None:
    value = as_json("stats", dataset, "--run", run_file)
    asked = RecallRequest(distances=(1, 3), held_out_distances=(5,), count=60, held_out_count=8, turns=6)
    assert set(value["sources"]) == {f"{part.source}-{part.language}" for part in parts(asked)}
    totals = load_dialogue_manifest(dataset).totals
    for name, source in value["sources"].items():
        opened = [DialogueDataset(dataset, split, name) for split in ("train", "eval")]
        distances = [distance for data in opened for index in range(len(data))
                     for distance in data.recalls(index)[:, 0].tolist() if distance]  # fmt: skip
        assert {int(key): count for key, count in source["recalls"].items()} == {
            distance: distances.count(distance) for distance in sorted(set(distances))
        }
        turns = [len(data.dialogue(index)) for data in opened for index in range(len(data))]
        assert source["turns"]["longest"] == max(turns) <= 6
        assert source["turns"]["mean"] == pytest.approx(np.mean(turns))
        assert max(map(int, source["recalls"])) == int(name.split("-")[1][1:])
    assert sum(source["share"] for source in value["sources"].values()) == pytest.approx(1)
    epochs = {item["source"]: item["epochs"] for item in value["mixture"]}
    trained = len(DialogueDataset(dataset, "train", "recall-d3-en"))
    assert epochs["recall-d3-en"] == pytest.approx(3072 / trained)
    assert epochs["recall-d5-en"] == 0
    assert value["totals"]["turns"] == totals.turns
    text = " ".join(run("stats", dataset).stdout.split())
    assert "recalls by distance" in text
    assert "Held-out dialogues that stand in training too, of whatever source: 0." in text
    refused = run("stats", dataset, "--sample", 10).exception
    assert isinstance(refused, ConfigError)
    assert "holds dialogues, which are few and read whole" in str(refused)


def test_statistics_find_doubles_and_what_was_held_out_of_training_in_vain(tmp_path: Path) -> None:
    talk = {"interactions": [{"query": "Good day to you.", "answer": "And to you."}] * 2, "language": "en"}
    other = {**talk, "interactions": talk["interactions"] * 2}
    records = [talk, talk, other, {**talk, "source": "late", "held_out": True}]
    (tmp_path / "talk.jsonl").write_bytes(golden_inputs.lines(records))
    (tmp_path / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    as_json("interactions", tmp_path / "talk.jsonl", "--kind", "dialogues", "--tokenizer", tmp_path / "tokenizer.json",
            "--seq-len", 64, "--out", tmp_path / "data", "--eval-fraction", 0)  # fmt: skip
    sources = as_json("stats", tmp_path / "data")["sources"]
    assert [sources["en"][key] for key in ("duplicates", "held_out_also_in_training")] == [1, 0]
    assert [sources["late-en"][key] for key in ("duplicates", "held_out_also_in_training")] == [0, 1]
    assert sources["en"]["recalls"] == {}


def test_a_mixture_of_dialogues_counts_the_turns_of_its_run(dataset: Path, run_file: Path) -> None:
    value = as_json("mix", run_file)
    assert value["seq_len"] == TURNS * SEQ_LEN
    rows = [{source["source"]: source["tokens"] // value["seq_len"] for source in phase["sources"]}
            for phase in value["phases"]]  # fmt: skip
    assert (rows[0]["recall-d1-en"], rows[0]["recall-d3-en"]) == (2048, 0)
    assert (rows[1]["recall-d1-en"], rows[1]["recall-d3-en"], rows[1]["recall-d3-pl"]) == (0, 3072, 1024)
    assert all(phase["recall-d5-en"] == 0 for phase in rows)
    refused = run("mix", dataset).exception
    assert isinstance(refused, ConfigError)
    assert "holds dialogues, and how many turns of each are read" in str(refused)


def test_a_data_file_and_a_stage_of_documents_do_not_say_how_dialogues_are_read(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(json.dumps({"path": str(dataset)}))
    refused = run("show", dataset, "--position", 0, "--run", tmp_path / "data.yaml").exception
    assert isinstance(refused, ConfigError)
    assert "is a data file, which does not say how many turns of a dialogue a stage reads" in str(refused)
    (tmp_path / "run.yaml").write_text(
        f"name: x\nmodel: {CONFIGS}/model/demo.yaml\ndata: {{path: {dataset}}}\ntrain: {{total_tokens: 65536, "
        f"global_batch_tokens: 4096}}\nparallel: {{engine: plain, zero: 0}}\ncheckpoint: {{every_tokens: 65536}}\n"
    )
    for verb in (("show", dataset, "--position", 0, "--run"), ("stats", dataset, "--run"), ("mix",)):
        refused = run(*verb, tmp_path / "run.yaml").exception
        assert isinstance(refused, DataError), verb
        assert "holds dialogues, but stage 'joint' of x reads rows" in str(refused)


def test_verify_and_diff_know_the_column_of_recalls(dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    assert as_json("verify", root)["damaged"] == {}
    assert as_json("diff", dataset, root)["same"] is True
    shard = next((root / "recall-d3-en/train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    recalls = DialogueDataset(root, "train", "recall-d3-en").recalls(0)
    numbers = recalls.astype("<u2").tobytes()
    at = content.index(numbers)
    content[at + numbers.index(3)] ^= 1
    shard.write_bytes(content)
    assert [finding.file for finding in verify_full(root).findings] == [shard.relative_to(root).as_posix()]
    with pytest.raises(DataError, match="blake3 differs"):
        DialogueDataset(root, "train", "recall-d3-en").recalls(0)
