from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

import data_prep.tokenizing.heartbeat as heartbeat_module
from data_prep.corpora import Document
from data_prep.tokenizing import tokenizer as tokenizer_module
from data_prep.tokenizing.heartbeat import heartbeat

# Longer than any machine is busy: the work of these tests waits for what it is to be told, and for no clock.
PATIENCE = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "SECONDS", 0.01)


class Listener:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.said.append(line)
            self._more.notify_all()

    def wait_for(self, word: str) -> None:
        """Until a line with this word was said."""
        with self._more:
            assert self._more.wait_for(lambda: any(word in line for line in self.said), PATIENCE), self.said


def test_work_that_takes_long_says_how_far_it_is_and_no_more_when_it_ends() -> None:
    listener, steps = Listener(), iter(range(100_000))
    threads = threading.active_count()
    with heartbeat(lambda: f"step {next(steps)}", listener):
        listener.wait_for("step 1,")
    assert listener.said[:2] == ["step 0, 0 s", "step 1, 0 s"]
    assert threading.active_count() == threads


def test_an_error_in_the_work_comes_through_and_ends_it() -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="broken"), heartbeat(lambda: "x", Listener()):
        raise ValueError("broken")
    assert threading.active_count() == threads


@pytest.mark.slow
def test_training_says_how_much_it_has_read_and_then_that_it_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, taken = Listener(), tokenizer_module._Taking.__next__

    def next_slowly(taking: tokenizer_module._Taking) -> str:
        try:
            return taken(taking)
        except StopIteration:
            listener.wait_for("merging")  # as merging takes its time
            raise

    monkeypatch.setattr(tokenizer_module._Taking, "__next__", next_slowly)

    def slowly() -> Iterator[Document]:
        for number in range(5):
            yield Document(f"text {number} " * 100_000, "en", "en", str(number))
        listener.wait_for("read and counted")

    tokenizer_module.train_tokenizer(slowly(), 300, say=listener)
    reading = [line for line in listener.said if "read and counted so far" in line]
    merging = [line for line in listener.said if "4 MB of text read; merging pairs up to 300 ids, " in line]
    assert listener.said == [*reading, *merging]
    assert "Training the tokenizer: " in reading[0]
