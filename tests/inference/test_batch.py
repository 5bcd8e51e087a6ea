"""Files of prompts: every line is checked first, and gets what it would get alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering import assistant_of

from rxt_dist.errors import DataError
from rxt_dist.inference import Assistant, Sampling
from rxt_dist.inference.batch import answer_all, read_conversations

HOT = Sampling(temperature=1.0, max_tokens=6)
LINES = [
    {"id": 1, "query": "hello"},
    {"turns": [{"query": "one", "internal": "x"}, {"tool_result": "{}", "mode": "think"}], "system": "be kind"},
    {"query": "a third", "mode": "auto", "answers": "are replaced"},
]


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return assistant_of(tmp_path_factory.mktemp("assistant"))


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.slow
def test_the_number_at_once_decides_nothing(assistant: Assistant, tmp_path: Path) -> None:
    conversations = read_conversations(written(tmp_path / "in", *LINES, ""), assistant)
    said: list[str] = []
    found = [
        list(answer_all(assistant, conversations, HOT, at_once=at_once, seed=5, report=said.append))
        for at_once in (1, 2, 8)
    ]
    assert found[0] == found[1] == found[2]
    assert said[-1] == "3 of 3 conversations"
    assert [len(record["answers"]) for record in found[0]] == [1, 2, 1]
    assert found[0][0]["id"] == 1
    assert "ended" in found[0][0]["answers"][0]
    session = assistant.session(6, "be kind")
    first = assistant.answer([session], [conversations[1].turns[0]], HOT)[0]
    assert found[0][1]["answers"][0].get("answer", "") == first.answer
    other = list(answer_all(assistant, conversations, HOT, at_once=8, seed=6))
    assert other != found[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', "line 2: this is not JSON: "),
        ("[1]", "line 2: a line must be an object"),
        ({}, "line 2: An interaction begins with either"),
        ({"query": 3}, "line 2: query must be text, and is int"),
        ({"query": " "}, "line 2: The query is empty"),
        ({"query": "x" * 90}, "line 2: The prompt has 92 tokens"),
        ({"query": "a", "mode": "fast"}, "line 2: The mode is 'fast'"),
        ({"turns": []}, "line 2: turns must be a list"),
        ({"turns": "x"}, "line 2: turns must be a list"),
        ({"query": "a", "system": 3}, "line 2: system must be text"),
    ],
)
def test_a_line_that_asks_nothing(assistant: Assistant, tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_conversations(written(tmp_path / "in", {"query": "a"}, line), assistant)


def test_only_a_line_feed_ends_a_line(assistant: Assistant, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"query": "a\u2028b\x85c"}\r\n{"query": "d"}\n', encoding="utf-8", newline="")
    first, second = read_conversations(tmp_path / "in", assistant)
    assert (first.record["query"], second.record["query"]) == ("a\u2028b\x85c", "d")


def test_files_that_hold_nothing(assistant: Assistant, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none", "cannot be read"), (tmp_path / "bytes", "cannot be read")):
        with pytest.raises(DataError, match=message):
            read_conversations(path, assistant)
    with pytest.raises(DataError, match="has no line"):
        read_conversations(written(tmp_path / "empty", "", ""), assistant)
