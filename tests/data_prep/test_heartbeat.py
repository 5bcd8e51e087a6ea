from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import data_prep.tokenizing.heartbeat as heartbeat_module
from data_prep.corpora import Document
from data_prep.tokenizing import tokenizer as tokenizer_module
from data_prep.tokenizing.heartbeat import heartbeat


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "SECONDS", 0.02)


def test_work_that_takes_long_says_how_far_it_is_and_no_more_when_it_ends() -> None:
    said: list[str] = []
    steps = iter(range(1000))
    with heartbeat(lambda: f"step {next(steps)}", said.append):
        time.sleep(0.15)
    assert said[:2] == ["step 0, 0 s", "step 1, 0 s"]
    count = len(said)
    time.sleep(0.1)
    assert len(said) == count


def test_an_error_in_the_work_comes_through_and_ends_it() -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="broken"), heartbeat(lambda: "x", said.append):
        raise ValueError("broken")
    time.sleep(0.05)
    assert said == []


def test_training_says_how_much_it_has_read_and_then_that_it_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tokenizer_module._Taking.__next__

    def next_slowly(taking: tokenizer_module._Taking) -> str:
        try:
            return taken(taking)
        except StopIteration:
            time.sleep(0.1)  # as merging takes its time
            raise

    monkeypatch.setattr(tokenizer_module._Taking, "__next__", next_slowly)

    def slowly() -> Iterator[Document]:
        for number in range(5):
            time.sleep(0.03)
            yield Document(f"text {number} " * 100_000, "en", "en", str(number))

    said: list[str] = []
    tokenizer_module.train_tokenizer(slowly(), 300, say=said.append)
    reading = [line for line in said if "read and counted so far" in line]
    merging = [line for line in said if "4 MB of text read; merging pairs up to 300 ids, " in line]
    assert reading
    assert merging
    assert said == [*reading, *merging]
    assert "Training the tokenizer: " in reading[0]
