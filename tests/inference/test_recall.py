"""Conversations of the model's own, and what of them counts as recalled."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from answering import network_of
from byte_tokenizer import byte_tokenizer
from tokenizers import pre_tokenizers

from data_prep.interactions.build import InteractionRequest, build_interactions
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.data.text import Text
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference import Assistant, Sampling
from rxt_dist.inference.recall import (
    Recalled,
    Turn,
    converse,
    holds,
    recall_by_distance,
    sources_that_recall,
)

TOLD = [
    [("my cat is Tom", "ok", None), ("who?", "it is Tom", (1, "Tom"))],
    [("my dog is Rex", "nice", None), ("it barks", "I see", None), ("who barks?", "Rex", (2, "Rex"))],
    [("Ala", "yes", None), ("8", "no", None), ("name?", "Ala", (2, "Ala")), ("number?", "8", (2, "8"))],
    [("hi", "hello", None), ("bye", "see you", None)],
]
GREEDY = Sampling(temperature=0)
# An untrained model says all that a turn has room for.
TURN = 24


def dialogues(folder: Path, records: list[list[tuple[str, str, tuple[int, str] | None]]]) -> Path:
    lines = []
    for record in records:
        items = []
        for query, answer, recall in record:
            asked = {"recall": {"distance": recall[0], "value": recall[1]}} if recall else {}
            items.append({"query": query, "answer": answer} | asked)
        lines.append({"interactions": items, "language": "en"})
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    alphabet = {char: 11 + number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = byte_tokenizer(folder / "tokenizer.json", SPECIAL_TOKENS | alphabet)
    inputs = (folder / "in.jsonl",)
    build_interactions(
        InteractionRequest(
            inputs, folder / "data", tokenizer, seq_len=TURN, kind="dialogues", eval_fraction=0.99, workers=1
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dialogues(tmp_path_factory.mktemp("talks"), TOLD)


@pytest.fixture(scope="module")
def assistant(talks: Path) -> Assistant:
    return Assistant(network_of("vocab_size=288", f"seq_len={TURN}"), Text(talks / "tokenizer.json", 288))


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.slow
def test_each_conversation_is_a_session_of_its_own(assistant: Assistant, talks: Path, at_once: int) -> None:
    """What is told stays the dialogue's, what is written is what the model said."""
    (source,) = sources_that_recall(talks)
    held_out = len(DialogueDataset(talks, "eval"))
    found = list(converse(assistant, talks, source, 64, at_once=at_once))
    assert len(found) == held_out >= 3
    for number, turns in enumerate(found):
        session = assistant.session(seed=number)
        for turn in turns:
            blank = session.fork()
            blank.hand_over(_done(torch.zeros_like(session.memory)), 0)
            if turn.value:
                assert assistant.answer([blank], [turn.query], GREEDY)[0].answer.strip() == turn.said["zero"]
            assert assistant.answer([session], [turn.query], GREEDY)[0].answer.strip() == turn.said["true"]
            wanted = (
                {"true"} | ({"zero"} if turn.value else set()) | ({"foreign"} if turn.value and at_once > 1 else set())
            )
            assert set(turn.said) == wanted
    asked = [(turn.query, turn.value, turn.distance) for turns in found for turn in turns if turn.value]
    assert {*asked} <= {(q, recall[1], recall[0]) for record in TOLD for q, _, recall in record if recall}
    assert asked


@pytest.mark.slow
def test_foreign_is_the_memory_of_the_dialogue_before(assistant: Assistant, talks: Path) -> None:
    found = list(converse(assistant, talks, sources_that_recall(talks)[0], 64, at_once=8))
    sessions = [assistant.session(seed=number) for number in range(len(found))]
    differ = 0
    for number in range(max(map(len, found))):
        memories = [session.memory for session in sessions]
        here = [(row, turns[number]) for row, turns in enumerate(found) if number < len(turns)]
        for row, turn in here:
            if turn.value:
                other = sessions[row].fork()
                other.hand_over(_done(memories[row - 1]), 0)
                assert assistant.answer([other], [turn.query], GREEDY)[0].answer.strip() == turn.said["foreign"]
                differ += turn.said["foreign"] != turn.said["true"]
        for row, turn in here:
            assistant.answer([sessions[row]], [turn.query], GREEDY)
    assert differ


def _done(memory: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(memory)
    return future


def test_what_counts_as_recalled() -> None:
    assert holds("It is Tom.", "Tom")
    assert holds("o piątej trzydzieści!", "piątej trzydzieści")
    assert not holds("It is Tommy.", "Tom")
    assert not holds("89", "8")
    assert not holds("it is tom", "Tom")
    turns = [
        Turn("a", {"true": "x"}),
        Turn("who?", {"true": "Tom", "zero": "Rex", "foreign": "Tom"}, "Tom", 2),
        Turn("who?", {"true": "Tom", "zero": "Tom", "foreign": "no"}, "Rex", 2),
        Turn("who?", {"true": "Rex", "zero": "", "foreign": ""}, "Rex", 1),
    ]
    assert recall_by_distance("s", [turns, turns[:2]]) == [
        Recalled("s", 1, "true", 1, 1),
        Recalled("s", 1, "zero", 1, 0),
        Recalled("s", 1, "foreign", 1, 0),
        Recalled("s", 2, "true", 3, 2),
        Recalled("s", 2, "zero", 3, 0),
        Recalled("s", 2, "foreign", 3, 2),
    ]


def test_data_that_asks_for_nothing(assistant: Assistant, talks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds out no dialogue that says what it recalls"):
        sources_that_recall(dialogues(tmp_path, [TOLD[3], [*TOLD[3], *TOLD[3]], TOLD[3] * 3]))
    with pytest.raises(ConfigError, match="has no source 'other'"):
        list(converse(assistant, talks, "other", 8))
    short = Assistant(network_of("vocab_size=288", f"seq_len={TURN}"), assistant.text)
    short.config = short.config.model_copy(update={"seq_len": TURN // 2})
    with pytest.raises(DataError, match=f"turns of up to {TURN} tokens"):
        list(converse(short, talks, sources_that_recall(talks)[0], 8))
