"""`rxt-dist data tokenizer`."""

from __future__ import annotations

from pathlib import Path

import typer

from rxt_dist.commands.data.common import INPUTS, JSON, emit, print_table


def tokenizer(
    inputs: list[Path] = INPUTS,
    out: Path = typer.Option(Path("tokenizer.json"), help="Where to write the tokenizer."),
    vocab_size: int = typer.Option(4096, help="Number of ids, control tokens included; from 267 to 65,536."),
    as_json: bool = JSON,
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
        print_table(
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

    emit(as_json, value, show)
