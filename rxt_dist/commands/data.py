"""`rxt-dist data`: from raw text to verified shards, and looking at what is in them.

Heavy imports stand inside the verbs, so that `--help` stays fast.
"""

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

from rxt_dist.errors import DataError

if TYPE_CHECKING:
    from rxt_dist.data.format import DatasetManifest

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Turn text into token shards, check them, look at them.

    Your own text in two commands: `rxt-dist data build my_texts/ --out data/mine`, then name `data/mine` in a run.
    Nothing to train on yet? `rxt-dist data sample corpus/` writes a small English and Polish corpus.""",
)

_PLAIN_SECONDS = 10.0
_INPUTS = typer.Argument(..., help="Files or folders: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow.")
_DATASET = typer.Argument(..., help="A folder made by `rxt-dist data build`.")
_JSON = typer.Option(False, "--json", help="Print exactly one JSON object on stdout.")

Progress = Callable[[int, int], None]


def _emit(as_json: bool, value: dict[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        show()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
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
            _say(f"{what}: {done / 1e6:.1f} of {total / 1e6:.1f} MB ({100 * done / max(total, 1):.0f} %)")

    yield line


@app.command()
def sample(
    out: Path = typer.Argument(..., help="New folder for the corpus."),
    megabytes: float = typer.Option(3.0, min=0.01, help="Text to write, in MB; half English, half Polish."),
    seed: int = typer.Option(0, help="Another seed gives other texts; the same seed the same bytes."),
    as_json: bool = _JSON,
) -> None:
    """Write a small English and Polish corpus of stories, questions and dialogues.

    Example: `rxt-dist data sample corpus/` and then `rxt-dist data build corpus/ --out data/sample`.
    """
    from data_prep.synthetic import write_sample

    files = write_sample(out, int(megabytes * 1e6), seed)
    total = sum(size for _, size in files)

    def show() -> None:
        print(f"Wrote {len(files)} files, {total / 1e6:.1f} MB, to {out}.")
        print(f"Next: rxt-dist data build {out} --out DIR")

    _emit(as_json, {"out": str(out), "files": dict(files), "bytes": total}, show)


@app.command()
def tokenizer(
    inputs: list[Path] = _INPUTS,
    out: Path = typer.Option(Path("tokenizer.json"), help="Where to write the tokenizer."),
    vocab_size: int = typer.Option(4096, help="Number of ids, control tokens included; from 267 to 65,536."),
    as_json: bool = _JSON,
) -> None:
    """Train a byte-level BPE tokenizer on text, and report how well it fits each language.

    Example: `rxt-dist data tokenizer my_texts/ --out tokenizer.json --vocab-size 32768`. Few tokens a word are good:
    they make rows hold more text.
    """
    from data_prep.corpora import ReadCounts, find_files, read_file
    from data_prep.tokenizer import fit_report, save_tokenizer, train_tokenizer

    files = find_files(inputs)
    trained = train_tokenizer((doc for file in files for doc in read_file(file, ReadCounts())), vocab_size)
    sha256 = save_tokenizer(trained, out)
    reports = fit_report(trained, (doc for file in files for doc in read_file(file, ReadCounts())))
    languages = {report.language: report.to_dict() for report in reports}
    value = {"tokenizer": str(out), "sha256": sha256, "vocab_size": trained.get_vocab_size(), "languages": languages}

    def show() -> None:
        _print_table(
            f"{out}: {trained.get_vocab_size()} ids, sha256 {sha256[:16]}",
            ["language", "documents", "tokens a word", "bytes a token", "round trips failed"],
            [
                [name, str(row["documents"]), str(row["tokens_per_word"]), str(row["bytes_per_token"]),
                 str(row["round_trip_failures"])]
                for name, row in languages.items()
            ],
        )  # fmt: skip
        if trained.get_vocab_size() < vocab_size:
            print(f"The text is too small for {vocab_size} ids: no further pair of tokens occurs in it.")

    _emit(as_json, value, show)


@app.command()
def build(
    inputs: list[Path] = _INPUTS,
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted build is finished by running it again."),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer.json; without it one is trained on the inputs."),
    seq_len: int = typer.Option(256, help="Tokens a row: the sequence length you will train with."),
    vocab_size: int = typer.Option(4096, help="Ids of the tokenizer that is trained when none is given."),
    workers: int = typer.Option(os.cpu_count() or 1, help="Processes; changes the speed, never the result."),
    eval_fraction: float = typer.Option(0.02, help="Share of the documents held out, chosen by hash of their text."),
    as_json: bool = _JSON,
) -> None:
    """Tokenise and pack text into shards that training reads.

    Example: `rxt-dist data build my_texts/ --out data/mine --seq-len 512`. The language of a text is its `language`
    field, or a folder or file name such as `pl/` or `stories.pl.jsonl`; each language becomes a source that can be
    weighted in the mixture and is evaluated by itself.
    """
    from data_prep.build import BuildRequest, build_dataset

    started = time.monotonic()
    request = BuildRequest(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        vocab_size=vocab_size,
        eval_fraction=eval_fraction,
        workers=workers,
    )
    with _progress("Building") as progress:
        result = build_dataset(request, _say, progress)
    seconds = time.monotonic() - started
    value = _summary(out, result.manifest) | {
        "read": vars(result.counts),
        "units": result.units,
        "units_kept": result.units_kept,
        "seconds": round(seconds, 3),
    }

    def show() -> None:
        _print_summary(out, result.manifest)
        read = result.counts
        print(
            f"Read {read.documents:,} documents; skipped {read.empty} empty and {read.not_text} that are not text; "
            f"mended invalid UTF-8 in {read.repaired_utf8}. {result.units_kept} of {result.units} units were already "
            f"finished. {seconds:.1f} s."
        )
        if result.units_kept:
            print(f"Finished units are recognised by their sizes; `rxt-dist data verify {out}` reads their contents.")

    _emit(as_json, value, show)


@app.command()
def verify(dataset: Path = _DATASET, as_json: bool = _JSON) -> None:
    """Hash every file of a dataset and name each damaged one; exit code 65 if there is any.

    Example: `rxt-dist data verify data/mine`. Training does the same for each shard before it reads from it.
    """
    from rxt_dist.data.dataset import verify_dataset
    from rxt_dist.data.format import load_manifest

    manifest = load_manifest(dataset)
    total, done = sum(shard.bytes for shard in manifest.shards()), 0
    with _progress("Verifying") as progress:

        def on_shard(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        damaged = verify_dataset(dataset, lambda shard: on_shard(shard.bytes))
    count = sum(1 for _ in manifest.shards())
    value = {
        "dataset": str(dataset),
        "shards": count,
        "bytes": total,
        "root_digest": manifest.root_digest,
        "damaged": dict(damaged),
    }

    def show() -> None:
        if not damaged:
            print(f"{dataset} is sound: {count} shards, {total / 1e6:.1f} MB, root digest {manifest.root_digest}.")

    _emit(as_json, value, show)
    if damaged:
        files = "; ".join(f"{name} {problem}" for name, problem in damaged)
        raise DataError(
            f"{dataset} has {len(damaged)} damaged file{'s' * (len(damaged) > 1)}: {files}. Delete what is named and "
            f"run the same `rxt-dist data build` again: it rebuilds exactly the missing units."
        )


@app.command()
def stats(dataset: Path = _DATASET, as_json: bool = _JSON) -> None:
    """Documents, tokens, rows and padding of each source and split.

    Example: `rxt-dist data stats data/mine`.
    """
    from rxt_dist.data.format import load_manifest

    manifest = load_manifest(dataset)
    _emit(as_json, _summary(dataset, manifest), lambda: _print_summary(dataset, manifest))


@app.command()
def show(
    dataset: Path = _DATASET,
    position: int = typer.Option(..., min=0, help="Global position: which row of the training order."),
    seed: int = typer.Option(0, help="Seed of the order."),
    as_json: bool = _JSON,
) -> None:
    """Show the row that training reads at a global position, decoded, document by document.

    The order is that of a run without `data.mixture`, whose sources are mixed in proportion to their size. A position
    beyond the last row belongs to a later epoch.
    Example: `rxt-dist data show data/mine --position 0`.
    """
    import numpy as np

    from data_prep.tokenizer import load_tokenizer
    from rxt_dist.data.dataset import TokenDataset
    from rxt_dist.data.format import TOKENIZER_FILE
    from rxt_dist.data.sampler import GlobalOrder, Phase, proportional_weights

    opened = TokenDataset(dataset)
    sources = opened.order_sources()
    rows = [source.rows for source in sources]
    order = GlobalOrder(sources, [Phase(sum(rows) * opened.seq_len, proportional_weights(rows))], seed, opened.seq_len)
    source_N, row_N = order.rows(np.array([position]))
    source, row = int(source_N[0]), int(row_N[0])
    tokens = opened.read("train", source_N, row_N).tokens_NT[0].tolist()
    vocabulary = load_tokenizer(dataset / TOKENIZER_FILE)
    documents, at = [], 0
    for segment in opened.segments("train", source, row):
        text = vocabulary.decode(tokens[at : at + segment.length], skip_special_tokens=False)
        documents.append(vars(segment) | {"text": text})
        at += segment.length
    name = opened.sources[source].name
    epoch = position // sum(rows)
    value = {
        "position": position,
        "epoch": epoch,
        "source": name,
        "row": row,
        "padding": len(tokens) - at,
        "documents": documents,
    }

    def print_row() -> None:
        where = f"Position {position} (epoch {epoch}): row {row} of source {name}"
        print(f"{where}, {at} tokens and {len(tokens) - at} of padding")
        for number, document in enumerate(documents):
            print(f"\n--- segment {number}: {document['length']} tokens of document {document['document']}, "
                  f"from its token {document['offset']}")  # fmt: skip
            print(document["text"])

    _emit(as_json, value, print_row)


def _summary(dataset: Path, manifest: DatasetManifest) -> dict[str, Any]:
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


def _print_summary(dataset: Path, manifest: DatasetManifest) -> None:
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
    _print_table(
        f"{dataset}: rows of {manifest.seq_len}, {manifest.vocab_size} ids, digest {manifest.root_digest[:16]}",
        ["source", "split", "documents", "tokens", "rows", "padding", "documents cut", "bytes a token"],
        rows,
    )


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
