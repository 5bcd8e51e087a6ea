"""What cannot become, or be read as, a dataset of dialogues: refused in a paragraph, and nothing is made."""

from __future__ import annotations

import json
from pathlib import Path

import golden_inputs
import pytest
from data_verbs import run

from rxt_dist.config.load import load_run
from rxt_dist.config.stages import MAX_TURNS
from rxt_dist.errors import ConfigError, DataError, ExitCode, UserError
from rxt_dist.stages.base import stage_class

CONFIGS = Path(__file__).parents[3] / "configs"
TURN = {"query": "Which way is the river?", "answer": "Straight on, past the mill."}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tok.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    return tmp_path


def refused(
    place: Path, records: list[object], *options: object, seq_len: int = 96, tokenizer: str = "tok.json"
) -> str:
    """What `data interactions --kind dialogues` says of these records; no dataset has come of them."""
    (place / "talk.jsonl").write_bytes(golden_inputs.lines(records))
    result = run("interactions", place / "talk.jsonl", "--kind", "dialogues", "--tokenizer", place / tokenizer,
                 "--seq-len", seq_len, "--out", place / "out", *options)  # fmt: skip
    error = result.exception
    assert isinstance(error, UserError), result.output
    assert error.exit_code in (ExitCode.CONFIG, ExitCode.DATA)
    assert "\n" not in str(error).strip()
    assert not (place / "out/dataset.json").exists()
    assert not list(place.glob("out/*/*/*.arrow"))
    return str(error)


def test_turns_longer_than_the_row(place: Path) -> None:
    """All of them: there is nothing to build. One of several: it is left out and counted, as nothing of it may be."""
    long = {"interactions": [TURN, {"query": "Well?", "answer": "Far, " * 40}], "language": "en"}
    said = refused(place, [long, long])
    assert "There is nothing to build: 1 files hold no usable record" in said
    assert "2 too long for rows of 96" in said
    (place / "talk.jsonl").write_bytes(golden_inputs.lines([long, {"interactions": [TURN] * 2, "language": "en"}]))
    built = run("interactions", place / "talk.jsonl", "--kind", "dialogues", "--tokenizer", place / "tok.json",
                "--seq-len", 96, "--out", place / "other", "--json")  # fmt: skip
    assert json.loads(built.stdout)["read"]["too_long"] == 1
    assert json.loads(built.stdout)["sources"]["en"]["dialogues"] == 1


def test_more_turns_than_any_stage_reads(place: Path) -> None:
    endless = {"interactions": [TURN] * (MAX_TURNS + 1), "language": "en"}
    said = refused(place, [{"interactions": [TURN], "language": "en"}, endless])
    assert "talk.jsonl, line 2 is a dialogue of 1,025 interactions, but no stage reads more than 1,024" in said
    whole = {"interactions": [TURN] * MAX_TURNS, "language": "en"}
    (place / "talk.jsonl").write_bytes(golden_inputs.lines([whole]))
    built = run("interactions", place / "talk.jsonl", "--kind", "dialogues", "--tokenizer", place / "tok.json",
                "--seq-len", 96, "--out", place / "other", "--json")  # fmt: skip
    assert json.loads(built.stdout)["sources"]["en"]["interactions"] == MAX_TURNS


def test_a_tokenizer_without_the_control_tokens(place: Path) -> None:
    value = json.loads((place / "tok.json").read_text(encoding="utf-8"))
    value["added_tokens"] = [item for item in value["added_tokens"] if item["content"] not in ("[Q]", "[A]")]
    value["model"]["vocab"] = {token.strip("[]") if token in ("[Q]", "[A]") else token: number
                               for token, number in value["model"]["vocab"].items() if token not in "QA"}  # fmt: skip
    (place / "bare.json").write_text(json.dumps(value), encoding="utf-8")
    said = refused(place, [{"interactions": [TURN] * 2, "language": "en"}], tokenizer="bare.json")
    assert "bare.json does not have the control tokens at their ids" in said
    assert not (place / "out").exists()


def test_documents_where_dialogues_are_asked_for(place: Path) -> None:
    said = refused(place, [{"text": "Once upon a time."}])
    assert "talk.jsonl, line 1 holds no interaction: it has the fields ['text']" in said


def test_dialogues_where_documents_are_asked_for(place: Path) -> None:
    (place / "talk.jsonl").write_bytes(golden_inputs.lines([{"interactions": [TURN] * 2, "language": "en"}]))
    error = run("build", place / "talk.jsonl", "--out", place / "out", "--tokenizer", place / "tok.json").exception
    assert isinstance(error, DataError)
    assert "has no text column" in str(error)
    assert not [path for path in (place / "out").rglob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["joint", "decoder", "mlm", "sft", "decoder-sft", "memory", "smat"])
def test_each_stage_reads_its_own_kind_of_data(place: Path, kind: str) -> None:
    """A dataset of the other kind is refused before a folder of the run is there."""
    reads_dialogues = kind in ("memory", "smat")
    records = [{"interactions": [TURN] * 2, "language": "en"}] * 2 if not reads_dialogues else [TURN] * 8
    (place / "talk.jsonl").write_bytes(golden_inputs.lines(records))
    made = run("interactions", place / "talk.jsonl", "--kind", "single" if reads_dialogues else "dialogues",
               "--tokenizer", place / "tok.json", "--seq-len", 96, "--out", place / "data", "--json")  # fmt: skip
    assert made.exit_code == 0, made.exception
    config = load_run(CONFIGS / "run/demo.yaml", [
        f"data.path={place / 'data'}", "data.seq_len=null", f"stage={{kind: {kind}}}", f"output={place / 'runs'}",
    ])  # fmt: skip
    with pytest.raises((ConfigError, DataError)) as caught:
        stage_class(config).source(config)
    assert "dialogues" in str(caught.value)
    assert not (place / "runs").exists()
