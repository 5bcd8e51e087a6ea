from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_verbs import as_json, run

from rxt_dist.errors import ConfigError


def test_filters_are_tried_without_writing(corpus: Path, data_file: Path) -> None:
    before = sorted(corpus.rglob("*"))
    value = as_json("clean", data_file)
    assert value["clean"]["min_characters"] == 400
    assert value["whole"]
    assert set(value["sources"]) == {"stories-en", "stories-pl"}
    assert value["dropped"]["low"] == value["dropped"]["high"] == value["reasons"]["too_short"]["share"]
    assert value["tried"] == value["documents"] > 100
    assert all(len(sample["text"]) < 400 for sample in value["sources"]["stories-en"]["samples"]["too_short"])
    # Settings of the command line are laid over the file's.
    more = as_json("clean", data_file, "--filter", "min_characters=800", "--filter", "max_ngram_repetition=0.1")
    assert more["dropped"]["documents"] > value["dropped"]["documents"]
    assert more["reasons"]["repeated_ngrams"]["share"] > 0
    assert sorted(corpus.rglob("*")) == before


def test_a_sample_says_how_large_it_is_and_how_sure(corpus: Path, data_file: Path) -> None:
    exact, few = as_json("clean", data_file), as_json("clean", data_file, "--sample-mb", 0.05)
    assert not few["whole"]
    assert few["tried"] < few["documents"] / 2
    assert few["documents"] == pytest.approx(exact["documents"], rel=0.2)
    assert few["dropped"]["low"] <= exact["dropped"]["share"] <= few["dropped"]["high"]
    shown = run("clean", data_file, "--sample-mb", 0.05).stdout
    assert f"{few['tried']:,} of about {few['documents']:,} documents (" in shown
    assert f"{100 * few['dropped']['low']:.2f} % and {100 * few['dropped']['high']:.2f} %" in shown
    assert "95% of samples" in shown
    # The documents of a sample do not all stand for as many, and what they sum up to is no share of the corpus.
    told = run("clean", data_file).stdout
    assert "of the characters kept" in told
    assert "of the characters kept" not in shown
    for name, source in exact["sources"].items():
        assert f"{name}: {100 * source['kept_characters']:.2f} % of the characters kept" in told
        assert {"kept_characters", "normalised"} == source.keys() - few["sources"][name].keys()


def test_a_source_may_be_called_all(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    sources = [{"name": "all", "inputs": [f"{corpus}/text/en"]}, {"name": "b", "inputs": [f"{corpus}/text/pl"]}]
    path.write_text(json.dumps({"path": "x", "build": {"sources": sources, "clean": {"min_characters": 400}}}))
    value = as_json("clean", path)
    assert set(value["sources"]) == {"all", "b"}
    assert sum(source["documents"] for source in value["sources"].values()) == value["documents"]
    lines = [line.split("│") for line in run("clean", path).stdout.splitlines() if line.startswith("│")]
    shown = {line[1].strip(): line[2].strip() for line in lines}
    assert shown == {
        "all": f"{value['sources']['all']['documents']:,}",
        "b": f"{value['sources']['b']['documents']:,}",
        "all sources": f"{value['documents']:,}",
    }


def test_people_read_why_and_what(corpus: Path) -> None:
    shown = run("clean", corpus / "text", "--filter", "min_characters=400").stdout
    assert "documents were tried: the build drops exactly these" in shown
    assert "documents would be dropped" in shown
    assert ", too_short: " in shown
    duplicates = run("clean", corpus / "text", "--filter", "exact_duplicates=true").stdout
    assert "Duplicates are not looked for here" in duplicates


def test_mistakes_are_user_errors(corpus: Path) -> None:
    text = corpus / "text"
    for arguments, message in (
        ((text,), "No filter is on"),
        ((text, "--filter", "min_letter=0.5"), "Did you mean 'min_letters'"),
        ((text, "--filter", "min_letters=2"), "less than or equal to 1"),
        ((text, "--filter", "near_duplicates=true"), "near_duplicates: {}"),
    ):
        result = run("clean", *arguments)
        assert isinstance(result.exception, ConfigError), (arguments, result.output, result.exception)
        assert message in str(result.exception)
