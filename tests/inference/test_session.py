"""Conversations: one at a time, saved and loaded, forked, interrupted, written in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from answering import assistant_of, network_of
from safetensors.torch import load_file, save_file

from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference import Assistant, Prompt, Sampling, Token, WriteStarted, Written
from rxt_dist.inference import assistant as assistant_module
from rxt_dist.inference.assistant import weights_digest
from rxt_dist.inference.events import token_ids
from rxt_dist.inference.generate import write

HOT = Sampling(temperature=1.0, max_tokens=6)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return assistant_of(tmp_path_factory.mktemp("assistant"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes wait until this is set."""
    opened = threading.Event()

    def held(*arguments: object) -> torch.Tensor:
        assert opened.wait(10)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(assistant_module, "write", held)
    yield opened
    opened.set()


def talk(assistant: Assistant, session, queries: list[str]) -> list[tuple[int, ...]]:
    return [assistant.answer([session], [query], HOT)[0].ids for query in queries]


def test_events_of_an_interaction(assistant: Assistant) -> None:
    session = assistant.session(seed=3)
    events = list(assistant.interact(session, "hello", HOT))
    tokens = [event for event in events if isinstance(event, Token)]
    assert isinstance(events[-2], WriteStarted)
    assert isinstance(events[-1], Written)
    assert len(events) == len(tokens) + 2
    assert tokens[0].id == 6
    assert (events[-1].turn, len(events[-1].moved)) == (1, 2)
    assert all(moved > 0 for moved in events[-1].moved)
    ids = [token.id for token in tokens]
    assert list(token_ids(events)) == [*ids, -1, -2]
    assert list(token_ids(events, with_mode=False)) == [*ids[1:], -1, -2]


def test_what_is_written_is_the_prompt_and_all_that_was_said(assistant: Assistant) -> None:
    session = assistant.session(seed=3)
    before = session.memory
    (answer,) = assistant.answer([session], ["hello"], HOT)
    ids = [*Prompt("hello").ids(assistant.text, 64), *answer.ids]
    assert torch.equal(session.memory, write(assistant.network, before, [ids]))


def test_later_answers_depend_on_what_was_told(assistant: Assistant) -> None:
    one, other = assistant.session(), assistant.session()
    assistant.tell(one, "my cat", "is called Mruczek")
    assistant.tell(other, "my dog", "is called Rex")
    assert one.turn == 1
    assert talk(assistant, one, ["who?"]) != talk(assistant, other, ["who?"])
    assert assistant.session(system="be kind").turn == 1


def test_sessions_at_once_are_sessions_alone(assistant: Assistant) -> None:
    prompts = [Prompt("a"), Prompt("a much longer query", mode="think"), Prompt(tool_result="{}", mode="auto")]
    together = [assistant.session(seed) for seed in range(3)]
    alone = [assistant.session(seed) for seed in range(3)]
    for _ in range(2):
        answers = assistant.answer(together, prompts, HOT)
        for number, session in enumerate(alone):
            assert assistant.answer([session], [prompts[number]], HOT) == [answers[number]]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.memory, other.memory, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_saved_loaded_in_another_process_and_forked_answer_alike(tmp_path: Path) -> None:
    assistant = assistant_of(tmp_path)
    session = assistant.session(seed=5)
    talk(assistant, session, ["one", "two"])
    fork = session.fork()
    session.save(tmp_path / "new/mine.session")
    code = f"""
from pathlib import Path
from answering import assistant_of
from rxt_dist.inference import Sampling
assistant = assistant_of(Path({str(tmp_path)!r}))
session = assistant.load_session({str(tmp_path / "new/mine.session")!r})
assert session.turn == 2
print([assistant.answer([session], [q], Sampling(temperature=1.0, max_tokens=6))[0].ids for q in ("three", "four")])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    here = talk(assistant, session, ["three", "four"])
    assert elsewhere.stdout.strip() == str(here)
    assert talk(assistant, fork, ["three", "four"]) == here
    assert (fork.turn, session.turn) == (4, 4)


def test_a_fork_goes_its_own_way(assistant: Assistant) -> None:
    session = assistant.session(seed=5)
    talk(assistant, session, ["one"])
    fork, memory = session.fork(), session.memory.clone()
    talk(assistant, fork, ["other"])
    assert torch.equal(session.memory, memory)
    assert not torch.equal(fork.memory, memory)


@pytest.mark.parametrize("end", [GeneratorExit, KeyboardInterrupt])
def test_a_stream_that_is_interrupted_writes_what_was_said(assistant: Assistant, end: type[BaseException]) -> None:
    whole, closed = assistant.session(seed=3), assistant.session(seed=3)
    said = [event.id for event in assistant.interact(whole, "hello", HOT) if isinstance(event, Token)]
    before = closed.memory
    stream = assistant.interact(closed, "hello", HOT)
    heard = [next(stream).id for _ in range(3)]  # type: ignore[union-attr]
    with pytest.raises(end):
        stream.throw(end)  # type: ignore[attr-defined]
    assert heard == said[:3]
    ids = [*Prompt("hello").ids(assistant.text, 64), *heard]
    assert torch.equal(closed.memory, write(assistant.network, before, [ids]))
    assert closed.turn == 1


def test_an_interruption_before_anything_was_said_writes_nothing(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    session = assistant.session(seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(assistant_module, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk(assistant, session, ["hello"])
    assert session.turn == 0
    assert talk(assistant, session, ["hello"])


def test_an_error_leaves_the_memory_as_it_was(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    session = assistant.session(seed=3)
    before = session.memory
    with monkeypatch.context() as patched:
        patched.setattr(assistant.network.lm_head, "forward", None)
        patched.setattr(assistant.network.lm_head, "logits", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk(assistant, session, ["hello"])
    assert (session.memory is before, session.turn) == (True, 0)
    with monkeypatch.context() as patched:
        patched.setattr(assistant_module, "write", lambda *_: 1 / 0)
        stream = assistant.interact(session, "hello", HOT)
        with pytest.raises(ZeroDivisionError):
            list(stream)
    assert (session.memory is before, session.turn) == (True, 0)
    talk(assistant, session, ["hello"])
    assert session.turn == 1


def test_two_queries_at_once_on_one_session(assistant: Assistant) -> None:
    session = assistant.session(seed=3)
    first = assistant.interact(session, "one", HOT)
    next(first)
    with pytest.raises(ConfigError, match="being asked something already"):
        next(assistant.interact(session, "two", HOT))
    with pytest.raises(ConfigError, match="being asked something already"):
        assistant.answer([assistant.session(), session], ["a", "b"], HOT)
    fork = session.fork()
    assert talk(assistant, fork, ["two"])
    assert isinstance(list(first)[-1], Written), "the first was not disturbed"
    with pytest.raises(ConfigError, match="being asked something already"):
        assistant.answer([fork, fork], ["a", "b"], HOT)
    assert talk(assistant, fork, ["three"]), "a refusal leaves it free"


def test_whatever_needs_the_memory_waits_for_the_write(
    assistant: Assistant, gate: threading.Event, tmp_path: Path
) -> None:
    session = assistant.session(seed=3)
    before = session.memory
    stream = assistant.interact(session, "one", HOT)
    assert any(isinstance(event, WriteStarted) for event in stream), "told before the write is done"
    waiting = [
        threading.Thread(target=work)
        for work in (
            lambda: talk(assistant, session, ["two"]),
            lambda: session.fork(),
            lambda: session.save(tmp_path / "s"),
        )
    ]
    waiting[0].start()
    waiting[0].join(0.2)
    assert waiting[0].is_alive()
    gate.set()
    waiting[0].join(10)
    for work in waiting[1:]:
        work.start()
        work.join(10)
    saved = load_file(tmp_path / "s")["memory"]
    assert not torch.equal(saved, before)
    assert torch.equal(saved, session.memory)
    assert session.turn == 2


def test_sessions_of_another_model_or_damaged(assistant: Assistant, tmp_path: Path) -> None:
    path = tmp_path / "s"
    assistant.session().save(path)
    assert assistant.load_session(path).turn == 0
    other = assistant_of(tmp_path, seed=1)
    with pytest.raises(DataError, match="is of another model"):
        other.load_session(path)
    with pytest.raises(ConfigError, match="of another model"):
        other.answer([assistant.session()], ["a"])
    content = path.read_bytes()
    for place in (-1, -40, len(content) // 2, content.index(b'"turn":"0') + 8):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place:][1:])
        with pytest.raises(DataError, match="damaged"):
            assistant.load_session(path)
    for torn in (b"", content[:4], content[:200], b"\xff" * 8 + content[8:], content[:8] + b"{" + content[9:40]):
        path.write_bytes(torn)
        with pytest.raises(DataError, match="not a session"):
            assistant.load_session(path)
    save_file({"memory": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="not a session"):
        assistant.load_session(path)
    with pytest.raises(DataError, match="There is no session"):
        assistant.load_session(tmp_path / "none")
    for place in (tmp_path, tmp_path / "s/below"):
        with pytest.raises(ConfigError):
            assistant.session().save(place)


def test_prompts_and_interactions_that_do_not_fit(assistant: Assistant) -> None:
    session = assistant.session()
    with pytest.raises(DataError, match="leaves no room"):
        assistant.answer([session], ["x" * 80])
    with pytest.raises(DataError, match="cannot be written"):
        assistant.tell(session, "x" * 40, "y" * 40)
    with pytest.raises(ConfigError, match="seed is -1"):
        assistant.session(seed=-1)
    assert session.turn == 0
    assert talk(assistant, session, ["short"])


def test_the_digest_is_of_every_weight_that_answers(tmp_path: Path) -> None:
    network = network_of()
    digest = weights_digest(network)
    assert network.mlm_head is not None
    with torch.no_grad():
        network.mlm_head.dense.bias[0] += 1
    assert weights_digest(network) == digest
    for name, parameter in network.named_parameters():
        if not name.startswith("mlm_head"):
            value = parameter.data.view(-1)[-1].clone()
            parameter.data.view(-1)[-1] += 1
            assert weights_digest(network) != digest, name
            parameter.data.view(-1)[-1] = value


def test_bfloat16_keeps_a_float32_memory(tmp_path: Path) -> None:
    wide = assistant_of(tmp_path)
    narrow = Assistant(network_of(), wide.text, dtype=torch.bfloat16)
    assert narrow.identity == wide.identity, "a session goes from one to the other"
    sessions = wide.session(seed=1), narrow.session(seed=1)
    for session, assistant in zip(sessions, (wide, narrow), strict=True):
        assistant.tell(session, "my cat", "is Mruczek")
        assert session.memory.dtype == torch.float32
    difference = (sessions[0].memory - sessions[1].memory).norm() / sessions[0].memory.norm()
    assert difference < 0.02
    assert narrow.answer([sessions[1]], ["who?"], HOT)[0].ids
