"""A chat as a person has it: answers stream, commands are obeyed, what can be mended is told and nothing ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from answering import assistant_of

from rxt_dist.inference import Assistant, Sampling
from rxt_dist.inference.chat import HELP, Chat

HOT = Sampling(temperature=1.0, max_tokens=8)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return assistant_of(tmp_path_factory.mktemp("assistant"))


def talk(assistant: Assistant, *lines: str, **options: object) -> tuple[list[str], Chat]:
    """What was written after each line, and the chat at its end."""
    waiting, heard = iter(lines), []

    def read() -> str | None:
        heard.append("")
        return next(waiting, None)

    def write(text: str) -> None:
        heard[-1] += text

    chat = Chat(assistant, HOT, read, write, **options)  # type: ignore[arg-type]
    chat.run()
    return heard, chat


def test_answers_are_those_of_the_session(assistant: Assistant) -> None:
    heard, chat = talk(assistant, "hello", "", "who?")
    session = assistant.session()
    first, second = (assistant.answer([session], [query], HOT)[0] for query in ("hello", "who?"))
    assert first.answer
    assert first.answer in heard[0].replace("\n[call] ", "")
    assert heard[1] == ""
    assert second.answer in heard[2].replace("\n[call] ", "")
    assert torch.equal(chat.session.memory, session.memory)


def test_parts_are_labelled(assistant: Assistant) -> None:
    heard, _ = talk(assistant, "/mode think", "hello", "/tool {}", mode="answer")
    assert heard[1].startswith("[thinking] ")
    assert heard[2]


def test_saved_loaded_and_reset(assistant: Assistant, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    lines = ("hello", f"/save {file}", "who?", f"/load {file}", "who?", "/memory", "/reset", "hello")
    heard, chat = talk(assistant, *lines)
    assert heard[1] == f"saved after 1 turns: {file}\n"
    assert heard[3] == "goes on after 1 turns\n"
    assert heard[2] == heard[4], "the same turn again"
    assert heard[5].splitlines()[0].startswith("turn 2:")
    assert len(heard[5].splitlines()) == 3
    assert "#" in heard[5]
    assert heard[7] == heard[0], "from the beginning"
    assert chat.session.turn == 1


def test_what_a_person_can_mend(assistant: Assistant, tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"x")
    mistakes = ("/sav", "/save", f"/load {tmp_path / 'torn'}", "/mode fast", "/tool", "x" * 90)
    heard, chat = talk(assistant, *mistakes, "/help", "hello", "/quit", "no")
    said = ("Did you mean 'save'?", "needs the name", "not a session", "one of answer", "is empty", "leaves no room")
    for text, part in zip(heard, said, strict=False):
        assert text.startswith("error: ")
        assert part in text
    assert heard[6] == HELP + "\n"
    assert chat.session.turn == 1
    assert len(heard) == 9, "nothing is read after /quit"


def test_an_answer_that_is_interrupted_is_remembered(assistant: Assistant) -> None:
    heard: list[str] = []
    lines: Iterator[str] = iter(["hello"])

    def write(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    def read() -> str | None:
        if (line := next(lines, None)) is None:
            raise KeyboardInterrupt
        return line

    chat = Chat(assistant, HOT, read, write)
    chat.run()
    assert heard[-1] == " [interrupted]\n"
    assert chat.session.turn == 1
    assert all(moved > 0 for moved in chat.session.moved)


def test_instructions_stand_in_the_first_memory(assistant: Assistant) -> None:
    _, with_system = talk(assistant, system="be kind")
    _, without = talk(assistant)
    assert with_system.session.turn == 1
    assert not torch.equal(with_system.session.memory, without.session.memory)
