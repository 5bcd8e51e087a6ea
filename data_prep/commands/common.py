"""What the verbs of `rxt-dist data` share: arguments, output, progress."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from data_prep.building.builder import Built
    from data_prep.building.workers import Progress as UnitProgress
    from rxt_dist.config.run import DataConfig
    from rxt_dist.data.dialogues import AnyManifest
    from rxt_dist.data.manifest import DatasetManifest

_PLAIN_SECONDS = 10.0
# Processes that start, and the first text that loads a tokenizer, say nothing of the time that is left.
_RATE_SECONDS, _RATE_BYTES = 10.0, 1_000_000
_PLAIN_WIDTH = 200
_NAME_WIDTH = 12
INPUTS = typer.Argument(..., help="Files or folders: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow.")
DATASET = typer.Argument(..., help="A folder made by `rxt-dist data build`.")
JSON = typer.Option(False, "--json", help="Print exactly one JSON object on stdout.")
WORKERS = typer.Option(os.cpu_count() or 1, help="Processes; changes the speed, never the result.")
TASK = typer.Option(None, help="Of an array of jobs, the number of this one, from 0.")
TASKS = typer.Option(None, help="How many jobs the array has; may differ from run to run.")

Progress = Callable[[int, int], None]


def emit(as_json: bool, value: dict[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        show()


def emit_unfinished(as_json: bool, out: Path, result: Built) -> None:
    """What a task of an array has to say that leaves units to others."""
    value = {"dataset": str(out), "units": result.units, "units_kept": result.units_kept}
    emit(as_json, value | {"unfinished": result.unfinished}, lambda: print(result.unfinished))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def warn_of_phases(data: DataConfig) -> None:
    """Say what training as long as the phases would refuse, before hours of work.

    It is no error of a build: the mixture decides nothing in the shards, and a shorter training may read them by it.
    """
    from rxt_dist.config.phases import check_phases
    from rxt_dist.errors import ConfigError

    try:
        check_phases(data.mixture, None, data.seq_len)
    except ConfigError as error:
        say(f"The shards do not hang on it, but training as long as the phases would refuse the mixture: {error}")


@contextmanager
def progress_bytes(what: str) -> Iterator[Progress]:
    """A bar on a terminal, a line every ten seconds elsewhere; both on stderr. Counts are bytes."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done / 1e6:.1f} of {total / 1e6:.1f} MB ({100 * done / max(total, 1):.0f} %)")

    yield line


@contextmanager
def progress_units() -> Iterator[Callable[[UnitProgress], None]]:
    """As `progress_bytes`, of the passes of a build over its units."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(10),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("Preparing", total=None, state="")

            def update(progress: UnitProgress) -> None:
                bar.update(
                    task,
                    description=progress.what,
                    completed=progress.bytes,
                    total=progress.total_bytes,
                    state=describe(progress),
                )

            yield update
        return
    last = time.monotonic()

    def line(progress: UnitProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_SECONDS:
            last = time.monotonic()
            share = 100 * progress.bytes / max(progress.total_bytes, 1)
            say(f"{progress.what}: {share:.0f} %, {describe(progress)}")

    yield line


def describe(progress: UnitProgress) -> str:
    """`units 12/64, 3 running, 34.1 MB/s, 8.20 Mtok/s, 2 min left`; the latter once there is a rate to speak of."""
    rate = progress.bytes / progress.seconds
    parts = [f"units {progress.done}/{progress.units}", f"{len(progress.running)} running"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append(f"{rate / 1e6:.1f} MB/s")
    if progress.tokens:
        parts.append(f"{progress.tokens / progress.seconds / 1e6:.2f} Mtok/s")
    if progress.seconds >= _RATE_SECONDS and progress.bytes >= _RATE_BYTES:
        parts.append(f"{_duration((progress.total_bytes - progress.bytes) / rate)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.0f} h"


def summary(dataset: Path, manifest: AnyManifest) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "dataset": str(dataset),
        "seq_len": manifest.seq_len,
        "vocab_size": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "root_digest": manifest.root_digest,
        "totals": asdict(manifest.totals),
        "sources": {
            source.name: {split: asdict(source.split(split).totals) for split in ("train", "eval")}
            for source in manifest.sources
        },
    }


def print_summary(dataset: Path, manifest: DatasetManifest) -> None:
    rows = []
    for source in manifest.sources:
        for split in ("train", "eval"):
            totals = source.split(split).totals
            padding = 100 * totals.padding / max(totals.rows * manifest.seq_len, 1)
            per_token = totals.text_bytes / max(totals.tokens, 1)
            rows.append(
                [source.name, split, f"{totals.documents:,}", f"{totals.tokens:,}", f"{totals.rows:,}",
                 f"{padding:.2f} %", f"{totals.split_documents:,}", f"{per_token:.2f}"]
            )  # fmt: skip
    print_table(
        f"{dataset}: rows of {manifest.seq_len}, {manifest.vocab_size} ids, digest {manifest.root_digest[:16]}",
        ["source", "split", "documents", "tokens", "rows", "padding", "documents cut", "bytes a token"],
        rows,
    )


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table of names (the first column) and figures.

    Where it does not fit, heads are wrapped and names folded; a figure is never cut, so that a very narrow terminal
    wraps whole lines instead. A pipe or a log, which has no width, counts as wide.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    width = Console().width if sys.stdout.isatty() else _PLAIN_WIDTH
    widths = [max((cell_len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    borders = 3 * len(columns) + 1
    heads = columns
    if borders + sum(map(max, widths, map(cell_len, columns))) > width:
        heads = [_wrapped(head, room) for head, room in zip(columns, widths, strict=True)]
    least = [max(room, *map(cell_len, head.split("\n"))) for head, room in zip(heads, widths, strict=True)]
    least[0] = min(least[0], _NAME_WIDTH)
    table = Table(title=title, title_justify="left")
    for index, (head, room) in enumerate(zip(heads, least, strict=True)):
        table.add_column(head, justify="right" if index else "left", no_wrap=index > 0, overflow="fold", min_width=room)
    for row in rows:
        table.add_row(*row)
    Console(width=max(width, borders + sum(least))).print(table)


def _wrapped(head: str, width: int) -> str:
    """A head over several lines, none longer than `width` where its words are not."""
    from textwrap import fill

    return fill(head, max(width, 1), break_long_words=False)
