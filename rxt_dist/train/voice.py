"""What a run says: to its files, to the terminal, on rank 0 only. On other ranks everything here is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from rxt_dist.train.evaluate import Evaluation
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.progress import Progress


class _Where(Protocol):
    @property
    def step(self) -> int: ...

    @property
    def tokens_seen(self) -> int: ...


class Voice:
    """Metrics, events and the progress line of one life of a run; `writer` is None on all ranks but the first."""

    def __init__(self, writer: MetricsWriter | None, progress: Progress) -> None:
        self._writer = writer
        self._progress = progress

    def line(self, position: _Where, figures: Mapping[str, float | list[float]], tokens: int) -> None:
        """One log step."""
        if self._writer is None:
            return
        values = {"tokens": tokens, "tokens_seen": position.tokens_seen, **figures}
        self._writer.log(position.step, values)
        self._progress.update(
            tokens,
            {
                "step": str(position.step),
                "ar": f"{figures['ar_loss']:.3f}",
                "mlm": f"{figures['mlm_loss']:.3f}",
                "accuracy": f"{100 * _number(figures['ar_accuracy']):.1f}%",
            },
        )

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once."""
        if self._writer is not None:
            self._writer.event(kind, **fields)
            self._progress.message(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in fields.items()))

    def evaluation(self, step: int, tokens: int, results: Sequence[Evaluation]) -> None:
        """An evaluation: one metrics line, and a table for a person."""
        if self._writer is None or not results:
            return
        values: dict[str, float] = {"tokens": tokens}
        for result in results:
            prefix = f"eval/{result.source}/{result.memory}"
            values[f"{prefix}/ar_loss"] = result.ar_loss
            values[f"{prefix}/ar_accuracy"] = result.ar_accuracy
            if result.memory == "true":
                values[f"eval/{result.source}/mlm_loss"] = result.mlm_loss
                values[f"eval/{result.source}/mlm_accuracy"] = result.mlm_accuracy
        self._writer.log(step, values)
        self._writer.event("eval", step=step, sources=len({result.source for result in results}))
        for text in evaluation_lines(results):
            self._progress.message(text)

    def message(self, text: str) -> None:
        """A line for a person only."""
        self._progress.message(text)


def evaluation_lines(results: Sequence[Evaluation]) -> list[str]:
    """A table of next-token accuracy and loss per source and memory."""
    table = Table(title="held-out rows: next-token accuracy (loss) by memory")
    for heading in ("source", "language", "rows", "true", "zero", "foreign", "masked tokens"):
        table.add_column(heading)
    for source in dict.fromkeys(result.source for result in results):
        found = {result.memory: result for result in results if result.source == source}
        one = found["true"]
        cells = [f"{100 * found[m].ar_accuracy:.1f}% ({found[m].ar_loss:.3f})" for m in ("true", "zero", "foreign")]
        mlm = f"{100 * one.mlm_accuracy:.1f}% ({one.mlm_loss:.3f})"
        table.add_row(source, one.language, str(one.rows), *cells, mlm)
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip().split("\n")


def _number(value: float | list[float]) -> float:
    assert not isinstance(value, list)
    return value
