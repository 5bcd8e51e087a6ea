"""What a run says: the names of its figures, what stands in the progress line and in the table of an evaluation."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from rxt_dist.stages.base import Term
from rxt_dist.train.evaluate import Evaluation
from rxt_dist.train.reporter import Reporter, evaluation_lines

# Of two terms that predict something one depends on the view; the third has no accuracy.
TERMS = (
    Term("next", "next tokens", predicts=True, by_view=True),
    Term("masked", "masked tokens", predicts=True),
    Term("balance"),
)
AT: Any = SimpleNamespace(step=12, tokens_seen=700)


class Recorder:
    """Stands for the metrics writer and for the progress line."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.shown: list[tuple[int, dict[str, str]]] = []
        self.said: list[str] = []

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.logged.append((step, values))

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def update(self, tokens: int, fields: dict[str, str]) -> None:
        self.shown.append((tokens, fields))

    def message(self, text: str) -> None:
        self.said.append(text)


def reporter_of(first: bool = True, terms: tuple[Term, ...] = TERMS) -> tuple[Reporter, Recorder]:
    recorder: Any = Recorder()
    return Reporter(recorder if first else None, recorder, terms), recorder


def seen(source: str, view: str, number: float, rows: int = 4) -> Evaluation:
    """Losses and accuracies that tell their source and view by `number`."""
    losses = {"next": number, "masked": number + 0.5}
    return Evaluation(source, "xx", view, rows, losses, {"next": number / 100, "masked": (number + 0.5) / 100})


TWO_VIEWS = [seen("en", "true", 1), seen("en", "zero", 2), seen("pl", "true", 3), seen("pl", "zero", 4)]


def test_figures_of_an_evaluation_are_named_by_source_view_and_term() -> None:
    """A term that all views share is named without one, and is that of the first view."""
    reporter, recorder = reporter_of()
    reporter.evaluation(12, 768, TWO_VIEWS, 0.25)
    ((step, values),) = recorder.logged
    assert step == 12
    assert values == {
        "tokens": 768,
        "eval/en/true/next_loss": 1,
        "eval/en/true/next_accuracy": 0.01,
        "eval/en/zero/next_loss": 2,
        "eval/en/zero/next_accuracy": 0.02,
        "eval/en/masked_loss": 1.5,
        "eval/en/masked_accuracy": 0.015,
        "eval/pl/true/next_loss": 3,
        "eval/pl/true/next_accuracy": 0.03,
        "eval/pl/zero/next_loss": 4,
        "eval/pl/zero/next_accuracy": 0.04,
        "eval/pl/masked_loss": 3.5,
        "eval/pl/masked_accuracy": 0.035,
    }
    assert recorder.events == [("eval", {"step": 12, "sources": 2, "seconds": 0.25})]


def test_the_one_view_of_a_stage_without_views_has_no_name() -> None:
    reporter, recorder = reporter_of()
    reporter.evaluation(12, 768, [seen("en", "", 1)], 0.25)
    ((_, values),) = recorder.logged
    assert values == {
        "tokens": 768,
        "eval/en/next_loss": 1,
        "eval/en/next_accuracy": 0.01,
        "eval/en/masked_loss": 1.5,
        "eval/en/masked_accuracy": 0.015,
    }


def test_an_evaluation_of_nothing_is_none() -> None:
    reporter, recorder = reporter_of()
    reporter.evaluation(12, 768, [], 0.25)
    assert (recorder.logged, recorder.events, recorder.said) == ([], [], [])


def cells(lines: list[str]) -> list[list[str]]:
    """The cells of each row of a table, its heading first."""
    rows = [re.split(r"[│┃|]", line)[1:-1] for line in lines if re.search(r"[│┃|]", line)]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_has_a_column_for_each_term_and_of_some_for_each_view() -> None:
    heading, *rows = cells(evaluation_lines(TWO_VIEWS, TERMS[:2]))
    assert heading[:3] == ["source", "language", "rows"]
    assert len(heading) == 3 + 2 + 1
    assert rows == [
        ["en", "xx", "4", "1.0% (1.000)", "2.0% (2.000)", "1.5% (1.500)"],
        ["pl", "xx", "4", "3.0% (3.000)", "4.0% (4.000)", "3.5% (3.500)"],
    ]


def test_headings_name_the_view_only_where_there_are_several() -> None:
    several = cells(evaluation_lines(TWO_VIEWS, TERMS[:2]))[0]
    assert several[3:] == ["next tokens: true", "next tokens: zero", "masked tokens"]
    one = cells(evaluation_lines([seen("en", "true", 1)], TERMS[:2]))[0]
    assert one[3:] == ["next tokens", "masked tokens"]


def test_many_views_stand_below_each_other() -> None:
    """Side by side their columns would be too narrow to be read."""
    views = [seen("en", view, number) for number, view in enumerate(("true", "zero", "foreign", "fresh", "none"), 1)]
    heading, *rows = cells(evaluation_lines(views, TERMS[:2]))
    assert heading == ["source", "view", "rows", "next tokens", "masked tokens"]
    assert [row[:2] for row in rows] == [["en", one.view] for one in views]
    assert [row[3] for row in rows] == [f"{n}.0% ({n}.000)" for n in range(1, 6)]
    assert rows[0][4] == "1.5% (1.500)"
    assert {row[4] for row in rows[1:]} == {""}


def test_a_line_shows_the_losses_of_predictions_and_the_accuracy_of_the_first() -> None:
    figures = {
        "next_loss": 3.25,
        "masked_loss": 5.0,
        "balance_loss": 1.5,
        "next_accuracy": 0.125,
        "masked_accuracy": 0.5,
        "expert_load_max": [1.0, 2.0],
    }
    reporter, recorder = reporter_of()
    reporter.line(AT, figures, 768)
    assert recorder.logged == [(12, {"tokens": 768, "tokens_seen": 700, **figures})]
    assert recorder.shown == [(768, {"step": "12", "next": "3.250", "masked": "5.000", "accuracy": "12.5%"})]


def test_a_stage_that_predicts_nothing_shows_its_step_alone() -> None:
    reporter, recorder = reporter_of(terms=(Term("reward"),))
    reporter.line(AT, {"reward_loss": 1.0}, 768)
    assert recorder.shown == [(768, {"step": "12"})]


def test_events_are_written_and_said() -> None:
    reporter, recorder = reporter_of()
    reporter.event("save", step=12, path="step-00000012")
    assert recorder.events == [("save", {"step": 12, "path": "step-00000012"})]
    assert recorder.said == ["save: step 12, path step-00000012"]


def test_ranks_other_than_the_first_are_silent() -> None:
    reporter, recorder = reporter_of(first=False)
    reporter.line(AT, {}, 768)
    reporter.event("save", step=12)
    reporter.evaluation(12, 768, TWO_VIEWS, 0.25)
    assert (recorder.logged, recorder.events, recorder.shown, recorder.said) == ([], [], [], [])


def test_a_term_that_predicts_nothing_may_have_a_loss_of_its_own() -> None:
    """A distance, say: told by its loss alone, wherever the others have an accuracy."""
    reporter, recorder = reporter_of(terms=(Term("distance", "distance of memories"), TERMS[1]))
    found = Evaluation("en", "xx", "", 4, {"distance": 0.25, "masked": 2.0}, {"masked": 0.5})
    reporter.evaluation(3, 768, [found], 0.25)
    assert recorder.logged[0][1] == {
        "tokens": 768,
        "eval/en/distance_loss": 0.25,
        "eval/en/masked_loss": 2.0,
        "eval/en/masked_accuracy": 0.5,
    }
    lines = evaluation_lines([found], (Term("distance", "distance of memories"), TERMS[1]))
    (row,) = [line for line in lines if "xx" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["en", "xx", "4", "0.250", "50.0% (2.000)"]


def test_details_are_left_to_the_files_and_what_counted_nothing_is_left_out() -> None:
    terms = (TERMS[0], Term("part", "part", predicts=True, by_view=True, detail=True), Term("rare", "rare", True))
    reporter, recorder = reporter_of(terms=terms)
    figures = {"next_loss": 1.0, "next_accuracy": 0.5, "part_loss": 2.0, "part_accuracy": 0.25}
    reporter.line(AT, figures, 768)
    assert recorder.shown == [(768, {"step": "12", "next": "1.000", "accuracy": "50.0%"})]
    assert recorder.logged[0][1] == {"tokens": 768, "tokens_seen": 700, **figures}
    found = Evaluation("en", "xx", "true", 4, {"next": 1.0, "part": 2.0}, {"next": 0.5, "part": 0.25})
    reporter.evaluation(12, 768, [found], 0.25)
    assert {key for key in recorder.logged[1][1] if "part" in key} == {
        "eval/en/true/part_loss",
        "eval/en/true/part_accuracy",
    }
    assert not any("rare" in key for key in recorder.logged[1][1])
    text = "\n".join(recorder.said)
    assert "part" not in text
    assert "rare" in text
