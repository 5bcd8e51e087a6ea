from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from data_verbs import as_json, run
from typer.testing import CliRunner

from data_prep.commands import app
from data_prep.commands.common import print_table
from rxt_dist.data.manifest import load_manifest
from rxt_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
BLOCK = 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Sources of 4,096, 12,288 and 8,192 expected rows of 1,002 tokens, of which 1,000 are not padding."""
    path = tmp_path / "data.yaml"
    source = "  - {{name: {}, inputs: [nowhere], language: {}, text_gb: {:.9f}}}\n"
    sizes = (("a", "en", 4_096), ("b", "en", 12_288), ("c", "pl", 8_192))
    path.write_text(
        f"path: {tmp_path / 'shards'}\nseq_len: 1002\nbuild:\n  eval_fraction: 0\n  sources:\n"
        + "".join(source.format(name, language, rows * 1000 * 4 / 1e9) for name, language, rows in sizes)
    )
    return path


def _rows(tokens: int) -> int:
    return tokens // 1002


def test_phases_by_hand_count(file: Path) -> None:
    length = 2 * BLOCK * 1002
    mixture = (
        f"mixture=[{{tokens: {length}, weights: {{a: 3, c: 1}}}}, {{tokens_per_source: {{b: {length}, c: {length}}}}}]"
    )
    # In one language, so that a row is as many bytes of text in each source.
    value = as_json("mix", file, mixture, "build.sources=" + _sources_in_polish(file))
    first, second = ([(s["source"], _rows(s["tokens"]), s["passes"]) for s in p["sources"]] for p in value["phases"])
    assert first == [("a", 6144, 1.5), ("b", 0, 0.0), ("c", 2048, 0.25)]
    assert second == [("a", 0, 0.0), ("b", 8192, pytest.approx(2 / 3)), ("c", 8192, 1.0)]
    again = [[_rows(source["repeated_tokens"]) for source in phase["sources"]] for phase in value["phases"]]
    assert again == [[2048, 0, 0], [0, 0, 2048]]
    assert [source["repeated_tokens"] // 1002 for source in value["sources"]] == [2048, 0, 2048]
    assert value["tokens"] == 3 * length
    assert "published" in value["sizes"]


def _sources_in_polish(file: Path) -> str:
    text = file.read_text()
    entries = [
        line.strip("- \n").replace("language: en", "language: pl") for line in text.splitlines() if "name:" in line
    ]
    return "[" + ", ".join(entries) + "]"


def test_shares_of_languages(file: Path) -> None:
    value = as_json(
        "mix", file, f"mixture=[{{tokens: {10 * BLOCK * 1002}, languages: {{en: 0.75, pl: 0.25}}}}]", "max_epochs=9"
    )
    assert value["languages"] == {"en": 0.75, "pl": 0.25}
    passes = {source["source"]: source["passes"] for source in value["sources"]}
    assert passes["a"] == pytest.approx(passes["b"], rel=1e-3)


def test_a_plan_with_too_many_passes_is_shown_and_refused(file: Path) -> None:
    mixture = f"mixture=[{{tokens: {9 * BLOCK * 1002}, weights: {{a: 1, b: 1}}}}]"
    result = run("mix", file, mixture, "--json")
    assert isinstance(result.exception, ConfigError)
    assert "passes over source 'a'" in str(result.exception)
    assert "smaller weight" in str(result.exception)
    assert json.loads(result.stdout)["sources"][0]["passes"] > 4
    assert run("mix", file, mixture, "max_epochs=6").exit_code == 0


def test_an_open_last_phase_needs_the_length_of_the_training(file: Path) -> None:
    mixture = "mixture=[{tokens: 4104192, weights: {a: 1}}, {languages: {pl: 1}}]"
    error = run("mix", file, mixture).exception
    assert isinstance(error, ConfigError)
    assert "--tokens" in str(error)
    value = as_json("mix", file, mixture, "--tokens", "8208384")
    assert [[_rows(s["tokens"]) for s in phase["sources"]] for phase in value["phases"]] == [[4096, 0, 0], [0, 0, 4096]]


def test_what_training_refuses_is_refused_here(file: Path) -> None:
    block = BLOCK * 1002
    whole, short = f"{{tokens: {block}, weights: {{a: 1}}}}", "{tokens: 100000, weights: {c: 1}}"
    for phases, tokens, said in (
        (f"{short}, {short}", (), "mixture.0 lasts 100,000 tokens"),
        (f"{{weights: {{a: 1}}}}, {whole}", (), "mixture.0.tokens is not set"),
        (f"{whole}, {whole}", ("--tokens", 3 * block), f"covers {2 * block:,} tokens of a training of {3 * block:,}"),
    ):
        error = run("mix", file, f"mixture=[{phases}]", *tokens).exception
        assert isinstance(error, ConfigError), phases
        assert said in str(error)
    assert as_json("mix", file, f"mixture=[{whole}, {whole}]", "--tokens", block)["tokens"] == block
    assert as_json("mix", file, f"mixture=[{whole}, {short}]")["tokens"] == block + 100 * 1002


def test_a_phase_of_another_dataset_waits_for_the_first_to_be_built(file: Path) -> None:
    error = run("mix", file, "mixture=[{tokens: 4104192, by_size: true}, {path: other, by_size: true}]").exception
    assert isinstance(error, ConfigError)
    assert "is not built yet" in str(error)


def test_a_table_in_a_pipe_is_wide(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["mix", str(file)])
    assert result.exit_code == 0
    heads, *sources = [line for line in result.stdout.splitlines() if line.startswith(("┃", "│"))]
    assert "┃ tokens of the source ┃" in heads
    assert [line.split()[1] for line in sources] == ["a", "b", "c"]
    assert {line.count("│") for line in sources} == {8}
    assert len(sources[0]) > 80


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_a_terminal_cuts_no_figure(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    name = "a-source-with-a-name-that-is-long"
    figures = ["123,456,789,012", "98.76 %", "12.34"]
    print_table("title", ["source", "tokens of the source", "share", "passes"], [[name, *figures]])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert sum(all(figure in line for figure in figures) for line in lines) == 1
    assert name in "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    # Below this width nothing is left to fold, and the terminal wraps the lines.
    assert all(len(line) <= max(width, 62) for line in lines)


def test_a_built_dataset_and_a_run_of_it(tmp_path: Path) -> None:
    as_json("sample", tmp_path / "corpus", "--megabytes", 0.15)
    sizes = ("--vocab-size", 500, "--seq-len", 64)
    as_json("build", tmp_path / "corpus", "--out", tmp_path / "out", *sizes, "--workers", 1)
    value = as_json("mix", tmp_path / "out")
    tokens_of = {source["source"]: source["tokens"] for source in value["sources"]}
    assert tokens_of == {s.name: 64 * s.train.totals.rows for s in load_manifest(tmp_path / "out").sources}
    assert all(source["passes"] == 1.0 and source["repeated_tokens"] == 0 for source in value["sources"])
    assert str(tmp_path / "out") in value["sizes"]
    tokens = sum(source["tokens"] for source in value["sources"])
    mixture = "mixture=[{languages: {en: 0.5, pl: 0.5}}]"
    even = as_json("mix", tmp_path / "out", mixture, "--tokens", tokens)
    assert even["languages"] == pytest.approx({"en": 0.5, "pl": 0.5}, abs=1e-3)
    of_run = as_json("mix", CONFIGS / "run/demo.yaml", f"data.path={tmp_path / 'out'}", "train.total_tokens=65536")
    assert of_run["tokens"] == 65536
    assert run("mix", tmp_path / "out").exit_code == 0


def test_the_mixture_of_rxt_beta_is_within_its_passes() -> None:
    value = as_json("mix", CONFIGS / "data/beta-400b.yaml")
    assert value["tokens"] == pytest.approx(400e9, rel=1e-4)
    assert max(source["passes"] for source in value["sources"]) < value["max_epochs"]
    assert min(source["passes"] for source in value["sources"]) > 3
    assert value["languages"]["pl"] > 0.11
    assert run("mix", CONFIGS / "data/beta-400b.yaml").exit_code == 0
