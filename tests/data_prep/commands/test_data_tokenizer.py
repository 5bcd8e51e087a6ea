from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_verbs import as_json, run

from rxt_dist.errors import ConfigError, DataError


@pytest.mark.slow
def test_weights_decide_the_sample(corpus: Path, data_file: Path) -> None:
    out = corpus / "weighed.json"
    arguments = ("--out", out, "--weight", "en=3", "--weight", "pl=1", "--sample-mb", 0.05)
    plain = as_json("tokenizer", corpus / "text", *arguments, "--vocab-size", 500)
    assert plain["vocab_size"] == 500
    assert plain["sample"] == {"en": {"bytes": 50_000, "share": 0.75}, "pl": {"bytes": 16_666, "share": 0.25}}
    by_source = as_json("tokenizer", data_file, "--out", out, "--weight", "stories-en=1", "--weight", "stories-pl=1")
    assert set(by_source["sample"]) == {"stories-en", "stories-pl"}
    assert by_source["vocab_size"] == 700
    overridden = as_json("tokenizer", data_file, "build.vocab_size=400", "--out", out)
    assert overridden["vocab_size"] == 400


@pytest.mark.slow
def test_report_and_comparison(corpus: Path) -> None:
    small, large = corpus / "small.json", corpus / "large.json"
    as_json("tokenizer", corpus / "text", "--out", small, "--vocab-size", 300)
    value = as_json(
        "tokenizer", corpus / "text", "--out", large, "--vocab-size", 900,
        "--compare", small, "--report", corpus / "report",
    )  # fmt: skip
    assert all(Path(name).is_file() for name in value["report"])
    assert value["compared"]["small"]["vocab_size"] == 300
    stored = json.loads((corpus / "report" / "report.json").read_text())
    assert stored["languages"] == value["languages"]
    assert stored["tokenizer"] == "large"


@pytest.mark.slow
def test_import_checks_and_copies(corpus: Path) -> None:
    made, copied = corpus / "made.json", corpus / "copied.json"
    trained = as_json("tokenizer", corpus / "text", "--out", made, "--vocab-size", 500)
    value = as_json("tokenizer", corpus / "text", "--import", made, "--out", copied)
    assert value["sha256"] == trained["sha256"]
    assert copied.read_bytes() == made.read_bytes()
    assert {check["problem"] for check in value["checks"]} == {None}
    content = json.loads(made.read_text())
    made.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    copied.unlink()
    result = run("tokenizer", corpus / "text", "--import", made, "--out", copied)
    assert isinstance(result.exception, DataError)
    assert "Set normalizer to null" in str(result.exception)
    assert not copied.exists()


@pytest.mark.slow
def test_people_read_what_was_done(corpus: Path) -> None:
    made = corpus / "read.json"
    result = run("tokenizer", corpus / "text", "--out", made, "--vocab-size", 300)
    assert "Trained on 0.2 MB of pl (50 %)." in result.stdout
    result = run("tokenizer", corpus / "text", "--import", made, "--out", corpus / "x.json", "--compare", made)
    assert "All 11 checks passed" in result.stdout
    assert "read (300 ids)" in " ".join(result.stdout.split())


def test_mistakes_are_user_errors(corpus: Path, data_file: Path, tmp_path: Path) -> None:
    text = corpus / "text"
    (tmp_path / "empty.yaml").write_text("path: x\n")
    for arguments, kind, message in (
        (("tokenizer", text, "--vocab-size", 9), ConfigError, "--vocab-size is 9"),
        (("tokenizer", text, "--weight", "en"), ConfigError, "--weight is 'en'"),
        (("tokenizer", text, "--weight", "fr=1"), DataError, "no text of it was found"),
        (("tokenizer", text, "--import", tmp_path / "no.json"), DataError, "does not exist"),
        (("tokenizer", text, "--import", "x.json", "--weight", "en=1"), ConfigError, "trains nothing"),
        (("tokenizer", text, "--compare", tmp_path / "no.json"), DataError, "cannot be compared"),
        (("tokenizer", data_file, text), ConfigError, "One data file at a time"),
        (("tokenizer", tmp_path / "empty.yaml"), ConfigError, "has no `build`"),
    ):
        out = ("--out", tmp_path / "t.json") if arguments[0] == "tokenizer" else ()
        result = run(*arguments, *out)
        assert isinstance(result.exception, kind), (arguments, result.output, result.exception)
        assert message in str(result.exception)
    assert not (tmp_path / "t.json").exists()
