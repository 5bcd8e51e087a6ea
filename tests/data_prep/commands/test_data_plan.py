from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_verbs import as_json, run

from rxt_dist.errors import ConfigError

BETA = Path(__file__).parents[3] / "configs/data/beta-400b.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my data.yaml"
    path.write_text(
        "path: shards\nseq_len: 100\nbuild:\n  unit_mb: 1\n  sources:\n"
        "  - {name: a, inputs: [nowhere], language: en, documents: 1000, text_gb: 0.0045}\n"
    )
    return path


def test_the_corpus_of_rxt_beta() -> None:
    value = as_json("plan", BETA, "--tasks", 64, "--workers", 8, "--rate", 10)
    assert set(value["sources"]) >= {"fineweb-edu-s100", "fineweb2-hq-pl", "beta-code-short"}
    total = value["total"]
    assert total["text_bytes"] == pytest.approx(445.18e9, rel=1e-3)
    assert total["documents"] == 96_595_821
    assert total["tokens"] == pytest.approx(445.18e9 / 4.45, rel=0.02)
    assert total["disk_bytes"] == pytest.approx(2 * total["tokens"], rel=0.02)
    assert total["core_hours"] == pytest.approx(total["tokens"] / 10e6 / 3600)
    assert total["core_hours"] / 64 / 8 < value["hours"] < total["core_hours"] / 64
    assert value["command"] == (
        "sbatch --array=0-63 --cpus-per-task=8 --wrap "
        f"'rxt-dist data build {BETA} --task $SLURM_ARRAY_TASK_ID --tasks 64 --workers 8'"
    )
    shown = run("plan", BETA, "--tasks", 64)
    assert shown.exit_code == 0
    for text in ("fineweb-edu-s100", "published", "445.18", "docs/benchmarks.md", "run the array again", "sbatch"):
        assert text in shown.output


def test_assumptions_can_be_given(file: Path) -> None:
    value = as_json("plan", file, "--rate", 2, "--bytes-per-token", "en=9", "seq_len=50", "build.eval_fraction=0")
    assert value["total"]["tokens"] == 4_500_000 / 9 + 2000
    assert value["seq_len"] == 50
    assert value["assumptions"]["rate_origin"] == "given"
    assert value["command"] == f"rxt-dist data build '{file}' seq_len=50 build.eval_fraction=0 --workers 1"
    for wrong in ("en", "en=", "=3", "en=-1", "en=x"):
        error = run("plan", file, "--bytes-per-token", wrong).exception
        assert isinstance(error, ConfigError)
        assert "LANGUAGE=BYTES" in str(error)


@pytest.mark.slow
def test_a_trial_takes_the_place_of_assumptions(file: Path, tmp_path: Path) -> None:
    texts = "".join(
        json.dumps({"text": f"The {n} bears and that which they have.", "lang": "en"}) + "\n" for n in range(500)
    )
    (tmp_path / "x.jsonl").write_text(texts)
    assert run("tokenizer", tmp_path / "x.jsonl", "--out", tmp_path / "t.json", "--vocab-size", 400).exit_code == 0
    value = as_json("plan", file, f"build.tokenizer={tmp_path / 't.json'}", "--measure", tmp_path / "x.jsonl")
    assert value["assumptions"]["rate_origin"].startswith("measured with")
    assert value["assumptions"]["bytes_per_token"]["en"] != 4.5
    per_token = value["assumptions"]["bytes_per_token"]["en"]
    assert value["total"]["tokens"] == int(4_500_000 / per_token) + 2000
