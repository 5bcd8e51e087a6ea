"""`rxt-dist data build`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import (
    JSON,
    TASK,
    TASKS,
    WORKERS,
    emit,
    emit_unfinished,
    print_summary,
    print_table,
    progress_units,
    say,
    summary,
    warn_of_phases,
)
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.cleaning.clean import CleanReport
    from data_prep.documents.build import BuildRequest, BuildResult

# What an option is called in a data file.
_FIELDS = {
    "out": "path",
    "tokenizer": "build.tokenizer",
    "seq_len": "seq_len",
    "vocab_size": "build.vocab_size",
    "eval_fraction": "build.eval_fraction",
}
_INPUTS = typer.Argument(
    ...,
    help="Files or folders: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow; or one DATA.yaml and a.b=c.",
)


def build(
    inputs: list[str] = _INPUTS,
    out: Path | None = typer.Option(
        None, help="Folder of the dataset; an interrupted build is finished by running it again."
    ),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer.json; without it one is trained on the inputs."),
    seq_len: int | None = typer.Option(
        None, metavar="TOKENS", help="Tokens a row, as you will train with.", show_default="256"
    ),
    vocab_size: int | None = typer.Option(
        None,
        metavar="IDS",
        help="Ids of the tokenizer that is trained where --tokenizer names none, from 267 to 65,536.",
        show_default="4096",
    ),
    eval_fraction: float | None = typer.Option(
        None,
        metavar="SHARE",
        help="Share of the documents held out, chosen by hash of their text.",
        show_default="0.02",
    ),
    workers: int = WORKERS,
    backend: str | None = typer.Option(
        None, help="What encodes: auto, tokenizers or gigatoken; auto takes the fast one where it proves equal."
    ),
    task: int | None = TASK,
    tasks: int | None = TASKS,
    as_json: bool = JSON,
) -> None:
    """Tokenise and pack text into shards that training reads.

    Example: `rxt-dist data build my_texts/ --out data/mine --seq-len 512`. The language of a text is its
    `language` field, or a folder or file name such as `pl/` or `stories.pl.jsonl`; each language becomes a source that
    can be weighted in the mixture and is evaluated by itself. Without --tokenizer one of 4,096 ids is trained.

    A data file with `build:` names sources, tokenizer and filters and is what training reads too:
    `rxt-dist data build configs/data/mine.yaml`, with overrides such as `build.unit_mb=64` behind it.

    As a job array, on nodes that share the folder: `rxt-dist data build DATA.yaml --task $SLURM_ARRAY_TASK_ID --tasks
    64`. The task that ends last finishes the dataset. Whatever was killed is finished by running the array again, with
    any number of tasks. With `clean.exact_duplicates` or `clean.near_duplicates` all units are surveyed before any is
    built: tasks that find surveys of others missing say so and end well; run the array once more.
    """
    from data_prep.documents.build import build_dataset

    options = {
        "tokenizer": tokenizer,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "eval_fraction": eval_fraction,
    }
    started = time.monotonic()
    request = _request(inputs, out, options, workers, backend, task, tasks)
    with progress_units() as progress:
        result = build_dataset(request, say, progress)
    _tell(request, result, time.monotonic() - started, as_json)


def _request(
    inputs: list[str],
    out: Path | None,
    options: dict[str, Any],
    workers: int,
    backend: str | None,
    task: int | None,
    tasks: int | None,
) -> BuildRequest:
    """The request that a command line means.

    Raises:
        ConfigError: options that do not go together.
    """
    from data_prep.building.encode import BACKENDS
    from data_prep.documents.build import BuildRequest

    if backend not in (None, "auto", *BACKENDS):
        raise ConfigError(f"--backend is '{backend}'; it must be auto, {' or '.join(BACKENDS)}.")
    common: dict[str, Any] = {"workers": workers, "task": task, "tasks": tasks}
    common |= {} if backend is None else {"backend": backend}
    given = {name: value for name, value in options.items() if value is not None}
    if not inputs[0].endswith((".yaml", ".yml")):
        if out is None:
            raise ConfigError("--out is missing: name the folder that the dataset is to be written to.")
        return BuildRequest(tuple(map(Path, inputs)), out, **given, **common)
    from rxt_dist.config.load import load_data

    stated = given if out is None else {"out": out, **given}
    if stated:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in stated)
        instead = [f"{_FIELDS[name]}={value}" for name, value in stated.items()]
        raise ConfigError(
            f"{inputs[0]} says how and where to build, so {names} cannot be given too. Change the file, or override "
            f"it behind its name: `{shlex.join(['rxt-dist', 'data', 'build', *inputs, *instead])}`."
        )
    wrong = [item for item in inputs[1:] if "=" not in item]
    if wrong:
        raise ConfigError(f"One data file at a time, without other inputs: {', '.join(wrong)} cannot stand beside it.")
    data = load_data(Path(inputs[0]), inputs[1:])
    warn_of_phases(data)
    return BuildRequest.of_data(data, **common)


def _tell(request: BuildRequest, result: BuildResult, seconds: float, as_json: bool) -> None:
    from data_prep.tokenizing.tokenizer import smaller_than_wanted

    out, manifest, read = request.out, result.manifest, result.counts
    if manifest is None:
        emit_unfinished(as_json, out, result)
        return
    value: dict[str, Any] = {"units": result.units, "units_kept": result.units_kept, "seconds": round(seconds, 3)}
    wanted = None if request.tokenizer is not None else request.vocab_size
    too_small = "" if wanted is None else smaller_than_wanted(manifest.vocab_size, wanted)

    def show() -> None:
        print_summary(out, manifest)
        print(
            f"Read {read.documents:,} documents; skipped {read.empty} empty, {read.null_text} without text, "
            f"{read.too_large} too large and {read.not_text} that are not text; mended invalid UTF-8 in "
            f"{read.repaired_utf8}. {result.units_kept} of {result.units} units were already finished. {seconds:.1f} s."
        )
        for line in (*_remarks(result), *([too_small] if too_small else [])):
            print(line)
        if result.dropped is not None:
            _print_dropped(result.dropped)
        if result.units_kept:
            print(f"Finished units are recognised by their sizes; `rxt-dist data verify {out}` reads their contents.")

    value |= {"read": vars(read), "passed_over": list(result.passed_over), "vocab_size_wanted": wanted}
    emit(as_json, summary(out, manifest) | value | {"clean": _dropped(result.dropped)}, show)


def _remarks(result: BuildResult) -> Iterator[str]:
    """What was not read, and where a language came from."""
    read = result.counts
    yield from result.passed_over
    if read.not_text:
        named = ", ".join(f"{file} ({documents:,})" for file, documents in read.not_text_in.items())
        more = ", and others" if sum(read.not_text_in.values()) < read.not_text else ""
        yield f"Not text, by file and number of documents: {named}{more}."
    if read.guessed:
        guessed = ", ".join(f"{count:,} {language}" for language, count in sorted(read.guessed.items()))
        yield (
            f"The language of {sum(read.guessed.values()):,} documents, which no tag, file or folder names, was "
            f"guessed from their text: {guessed}."
        )


def _dropped(report: CleanReport | None) -> dict[str, Any] | None:
    """What filters and duplicates dropped, for JSON; samples stand in clean.json."""
    if report is None:
        return None
    value = report.to_dict()
    for source in value["sources"].values():
        del source["samples"]
    return value


def _print_dropped(report: CleanReport) -> None:
    reasons = list(report.dropped)
    rows = [
        [name, f"{of.documents:,}", f"{of.kept:,}", *(f"{of.dropped.get(reason, 0):,}" for reason in reasons)]
        for name, of in sorted(report.sources.items())
    ]
    dropped = report.documents - report.kept
    share = 100 * dropped / max(report.documents, 1)
    print(f"Filters and duplicates dropped {dropped:,} of {report.documents:,} documents ({share:.2f} %):")
    print_table("", ["source", "documents", "kept", *reasons], rows)
