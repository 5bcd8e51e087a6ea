"""benchmarks/recall.py runs from its data to its picture, and what it counts is what it says."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from typer.testing import CliRunner

from rxt_dist.cli import app
from rxt_dist.data.interactions import ANSWER_ID, NO_LOSS, QUERY_ID, answer_labels
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.data.text import Text
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import recall  # noqa: E402
from recall_parts import arms, figures  # noqa: E402
from recall_parts.arms import ARMS, parameters, stateless  # noqa: E402
from recall_parts.histories import history  # noqa: E402
from recall_parts.stateless import Stateless  # noqa: E402

MODEL = recall.load_model(recall.MODEL, ["vocab_size=300"])


class InProcess(recall.Benchmark):
    """The same commands in this process, since each of its own would import for seconds."""

    def call(self, name: str, *arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        self.spent(name, 0.5)
        if tuple(words[:2]) == recall.PRODUCT:
            result = CliRunner().invoke(app, words[2:])
            assert result.exit_code == 0, (words, result.output, result.exception)
            return result.stdout
        before, sys.argv = sys.argv, words
        try:
            with redirect_stdout(io.StringIO()) as said:
                runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = before
        return said.getvalue()


@pytest.mark.slow
def test_the_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again, when nothing is left to do; with other settings it is refused."""
    monkeypatch.setattr(recall, "Benchmark", InProcess)
    # Training catches signals, which the main thread alone may.
    monkeypatch.setattr(recall, "ThreadPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    # A model that has learnt nothing does not end its answers: few conversations, and short rows.
    monkeypatch.setattr(recall, "DISTANCES", (1, 4))
    assert arms.source(arms.TRAINED[-1]) == figures._TURNS_OF
    monkeypatch.setattr(figures, "_TURNS_OF", arms.source(4))
    for module in (recall, arms):
        monkeypatch.setattr(module, "ROW", 40)
    command = ["recall.py", str(tmp_path / "out"), "--seeds", "1", "--steps", "2", "--held-out", "2"]
    monkeypatch.setattr(sys, "argv", command + ["--arms", "depth-1", "history"])
    recall.main()
    page = (tmp_path / "out/recall.md").read_text()
    assert [f"| {of.title} |" in page for of in ARMS.values()] == [False, False, True, True, False]
    assert (tmp_path / "out/recall.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [result["arm"] for result in results] == ["depth-1", "history"]
    for result in results:
        assert list(figures.recalls([result], "true")) == [1, 4]
        assert len(figures.perplexities([result], "true")) >= 5
    sizes = [result["parameters"] for result in results]
    assert max(sizes) < 1.005 * min(sizes)
    calls = (tmp_path / "out/cpu.jsonl").read_text()
    recall.main()
    assert (tmp_path / "out/cpu.jsonl").read_text().count("evaluation") == calls.count("evaluation")
    monkeypatch.setattr(sys, "argv", [*command[:-1], "3"])
    with pytest.raises(SystemExit, match="other settings"):
        recall.main()


def test_a_program_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    benchmark = recall.Benchmark(tmp_path, 4, 2)
    assert benchmark.call("fine", "-c", "print('said')") == "said\n"
    assert benchmark.cpu_seconds()["fine"] > 0
    with pytest.raises(SystemExit, match=r"(?s)bad ended with code 3.*why"):
        benchmark.call("bad", "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")


def test_both_models_have_the_same_number_of_parameters() -> None:
    alone = stateless(MODEL)
    assert parameters(alone) == pytest.approx(parameters(MODEL), rel=0.005)
    for model, unused in ((MODEL, ("mlm_head.",)), (alone, (".cross_attention.", ".cross_norm.", ".memory_norm."))):
        network = ReactiveTransformer(model)
        sizes = [
            parameter.numel()
            for name, parameter in network.named_parameters()
            if not any(part in f"{name}." for part in unused)
        ]
        assert parameters(model) == sum(sizes)


def turn(*text: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.array([BOS_ID, QUERY_ID, 20, ANSWER_ID, *text, EOS_ID], dtype=np.uint16)


def test_a_history_has_the_labels_of_its_turns() -> None:
    turns = [turn(30, 31), turn(32), turn(33, 34)]
    row = history(turns)
    assert row.tolist().count(BOS_ID) == 1
    assert len(row) == sum(map(len, turns)) - 2
    wanted = [label for one in turns for label in answer_labels(one[None])[0] if label != NO_LOSS]
    assert [label for label in answer_labels(row[None])[0] if label != NO_LOSS] == wanted


class Dialogues:
    """As much of a dataset as is read; the second turn of each asks for what the first has told."""

    manifest = SimpleNamespace(seq_len=16)

    def __init__(self, *dialogues: list[Any]) -> None:
        self._dialogues = dialogues

    def dialogue(self, index: int) -> list[Any]:
        return self._dialogues[index]

    def recalls(self, index: int) -> Any:
        return np.array([[0, 0, 0], *([1, 4, 5] for _ in self._dialogues[index][1:])])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    network = ReactiveTransformer(stateless(MODEL))
    initialise(network, 0)
    text = Text(byte_tokenizer(tmp_path / "tokenizer.json"), 300)
    return lambda whole: Stateless(network, text, whole)


def test_perplexity_is_of_the_turns_own_answers(model: Any) -> None:
    """A first turn has no history; a later one is another with it."""
    data = Dialogues([turn(30, 31), turn(32)], [turn(33), turn(34, 35)])
    without, whole = (model(kind).perplexities(data, 2) for kind in (False, True))
    assert [one["targets"] for one in without] == [one["targets"] for one in whole] == [5, 5]
    assert without[0]["perplexity"] == pytest.approx(whole[0]["perplexity"], rel=1e-5)
    assert without[1]["perplexity"] != pytest.approx(whole[1]["perplexity"], rel=1e-3)
    assert [one["before"] for one in whole] == [0, 6.5]
    total = 0.0
    for turns in map(data.dialogue, range(2)):
        losses = model(True)._losses(torch.from_numpy(history(turns).astype("int64")))
        total += float(losses[len(turns[0]) :].nansum())
    assert total == pytest.approx(5 * np.log(whole[1]["perplexity"]), rel=1e-4)


def test_what_it_said_is_its_history(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[list[int]]] = []
    written: list[list[list[int]]] = []
    answers = Stateless._answers

    def seen(self: Any, asked: list[list[int]], most: int) -> Any:
        prompts.append([list(ids) for ids in asked])
        rows = answers(self, asked, most)
        written.append([row.written if row.said[-1] == EOS_ID else [*row.written, EOS_ID] for row in rows])
        return rows

    monkeypatch.setattr(Stateless, "_answers", seen)
    data: Any = Dialogues([turn(30), turn(31), turn(32)], [turn(33), turn(34)])
    found = list(model(True).converse(data, 2))
    assert [[bool(one.value) for one in turns] for turns in found] == [[False, True, True], [False, True]]
    assert [len(asked) for asked in prompts] == [2, 2, 1]
    for before, after in zip(written, prompts[1:], strict=False):
        assert after == [[*ids, QUERY_ID, 20] for ids in before[: len(after)]]
    prompts.clear()
    list(model(False).converse(data, 2))
    assert prompts == [[[BOS_ID, QUERY_ID, 20]] * 2] * 2 + [[[BOS_ID, QUERY_ID, 20]]]


def test_recall_at_a_distance_is_of_the_dialogues_made_for_it() -> None:
    def one(source: str, distance: int, memory: str, recalled: int) -> dict[str, Any]:
        return {"source": source, "distance": distance, "memory": memory, "asked": 4, "recalled": recalled}

    asked = [one("recall-d2-en", 1, "true", 4), one("recall-d2-en", 2, "true", 3), one("recall-d2-en", 2, "zero", 1)]
    assert figures.recalls([{"recall": asked}] * 2, "true") == {2: [0.75, 0.75]}
    assert figures.recalls([{"recall": asked}], "zero") == {2: [0.25]}
