"""`rxt-dist chat`, `generate` and `evaluate`, as a person calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from answering import network_of
from byte_tokenizer import byte_tokenizer
from saved_run import whole_stage, write_run
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from rxt_dist.cli import app
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _stages() -> Iterator[None]:
    with whole_stage():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    byte_tokenizer(tmp_path / "tokenizer.json")
    return write_run(tmp_path / "run", network_of(), data=tmp_path)


def invoke(*arguments: str | Path, typed: str = "") -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_chat_from_a_pipe(run: Path, tmp_path: Path) -> None:
    first = invoke("chat", run, "--max-tokens", "5", typed=f"hello\n/save {tmp_path / 's'}\n")
    again = invoke("chat", run, "--max-tokens", "5", typed="hello\n/memory\n")
    assert first.splitlines()[0] == again.splitlines()[0]
    assert (tmp_path / "s").is_file()
    assert "turn 1:" in again
    half = invoke("chat", run, "--dtype", "bfloat16", "--device", "cpu", "--temperature", "0", typed="/quit\n")
    assert half == ""


def test_a_file_of_prompts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "hello"}\n{"turns": [{"query": "a"}, {"query": "b"}]}\n')
    invoke("generate", run, tmp_path / "in.jsonl", "--out", tmp_path / "new/out.jsonl", "--max-tokens", "4")
    lines = [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text().splitlines()]
    assert [len(line["answers"]) for line in lines] == [1, 2]
    (tmp_path / "bad.jsonl").write_text('{"query": "hello"}\n{"query": ""}\n')
    with pytest.raises(DataError, match="line 2"):
        invoke("generate", run, tmp_path / "bad.jsonl", "--out", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "temperature is -1"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "2"), "top_p is 2"),
        (("--top-k", "-3"), "top_k is -3"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--dtype", "half"), "--dtype is 'half'"),
        (("--device", "tpu"), "--device is 'tpu'"),
        (("--mode", "fast"), "--mode is 'fast'"),
    ],
)
@pytest.mark.slow
def test_values_out_of_range(run: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke("chat", run, *arguments, typed="hello\n")


def test_data_that_is_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a dataset"):
        invoke("evaluate", run, tmp_path / "nowhere")


@pytest.mark.slow
def test_what_a_model_recalls(tmp_path: Path) -> None:
    talks = tmp_path / "talks"
    alphabet = {char: 11 + number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_tokenizer(tmp_path / "tokenizer.json", SPECIAL_TOKENS | alphabet)
    run = write_run(tmp_path / "run", network_of("vocab_size=288"), data=tmp_path)
    invoke("data", "recall", talks, "--variety", "small", "--distances", "1,2", "--held-out-distances", "",
           "--facts", "1", "--fillers", "0", "--count", "4", "--held-out-count", "3", "--languages", "en")  # fmt: skip
    invoke("data", "interactions", talks, "--kind", "dialogues", "--tokenizer", tmp_path / "tokenizer.json",
           "--seq-len", "48", "--out", tmp_path / "data")  # fmt: skip
    figures = json.loads(invoke("evaluate", run, tmp_path / "data", "--recall", "--show", "1", "--json"))
    asked = {(one["source"], one["distance"]) for one in figures["recall"] if one["asked"]}
    assert {("recall-d1-values-en", 1), ("recall-d2-values-en", 2)} <= asked
    assert {len(talk["turns"]) for talk in figures["conversations"]} == {2, 3}
    told = invoke("evaluate", run, tmp_path / "data", "--recall", "--source", "recall-d2-values-en", "--show", "1")
    assert "zero memory:" in told
    assert "recall-d2-values-en      told  2 turns before: recalled with memory true" in told
    assert "recall-d1" not in told
    with pytest.raises(ConfigError, match="--source and --show belong to --recall"):
        invoke("evaluate", run, tmp_path / "data", "--show", "1")
