from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_verbs import as_json, run

from rxt_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    as_json("sample", root / "corpus", "--megabytes", 0.15)
    as_json("build", root / "corpus", "--out", root / "out", "--vocab-size", 800, "--seq-len", 64, "--workers", 1)
    return root


def test_from_nothing_to_a_decoded_row(built: Path) -> None:
    again = as_json("build", built / "corpus", "--out", built / "out", "--vocab-size", 800, "--seq-len", 64)
    assert again["units_kept"] == again["units"] == 1
    stats = as_json("stats", built / "out")
    assert stats["root_digest"] == again["root_digest"] == as_json("verify", built / "out")["root_digest"]
    assert set(stats["sources"]) == {"en", "pl"}
    assert stats["vocab_size"] == 800
    row = as_json("show", built / "out", "--position", 3)
    assert row["source"] in ("en", "pl")
    assert sum(document["length"] for document in row["documents"]) + row["padding"] == 64
    assert row == as_json("show", built / "out", "--position", 3)
    assert row != as_json("show", built / "out", "--position", 3, "--seed", 1)


def test_people_read_something_too(built: Path) -> None:
    for arguments, expected in (
        (("stats", built / "out"), "padding"),
        (("verify", built / "out"), "is sound"),
        (("show", built / "out", "--position", 0), "Position 0 (epoch 0): row"),
        (("tokenizer", built / "corpus", "--out", built / "t.json", "--vocab-size", 300), "tokens a word"),
        (("build", built / "corpus", "--out", built / "out", "--vocab-size", 800, "--seq-len", 64), "1 of 1 units"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert expected in result.stdout.replace("\n", " ")


def test_a_given_tokenizer_is_used(built: Path) -> None:
    trained = as_json("tokenizer", built / "corpus", "--out", built / "given.json", "--vocab-size", 500)
    assert set(trained["languages"]) == {"en", "pl"}
    out = as_json("build", built / "corpus", "--out", built / "given", "--tokenizer", built / "given.json")
    assert (out["tokenizer_sha256"], out["vocab_size"]) == (trained["sha256"], 500)


def test_verify_fails_and_names_the_damaged_file(built: Path, tmp_path: Path) -> None:
    as_json("build", built / "corpus", "--out", tmp_path / "out", "--vocab-size", 300)
    shard = next((tmp_path / "out" / "pl" / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    result = run("verify", tmp_path / "out")
    assert isinstance(result.exception, DataError)
    assert f"pl/train/{shard.name}" in str(result.exception)
    shard.unlink()
    as_json("build", built / "corpus", "--out", tmp_path / "out", "--vocab-size", 300)
    assert as_json("verify", tmp_path / "out")["damaged"] == {}


def test_mistakes_are_user_errors(built: Path, tmp_path: Path) -> None:
    for arguments, kind, message in (
        (("build", tmp_path / "none", "--out", tmp_path / "o"), DataError, "does not exist"),
        (("build", built / "corpus", "--out", built / "out"), DataError, "seq_len was 64 and is now 256"),
        (("build", built / "corpus", "--out", tmp_path / "o", "--vocab-size", 9), ConfigError, "--vocab-size is 9"),
        (("build", built / "corpus", "--out", tmp_path / "p", "--seq-len", 70_000), ConfigError, "70000"),
        (("stats", tmp_path), DataError, "not a dataset"),
        (("sample", built / "corpus"), DataError, "not empty"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, kind), result.output
        assert message in str(result.exception)


def test_help_teaches_and_loads_nothing_heavy() -> None:
    for verb in ("sample", "tokenizer", "build", "verify", "stats", "show", "diff", "repack"):
        assert "Example" in run(verb, "--help").stdout
    code = (
        "import sys; import data_prep.commands;"
        "assert not {'torch', 'numpy', 'pyarrow', 'tokenizers', 'rich.progress'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
