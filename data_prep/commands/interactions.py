"""`rxt-dist data interactions`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_prep.commands.common import JSON, emit, print_table, progress_bytes

if TYPE_CHECKING:
    from data_prep.interactions.build import InteractionResult


class Kind(StrEnum):
    single = "single"
    dialogues = "dialogues"


class Template(StrEnum):
    alpha = "alpha"
    beta = "beta"


def interactions(
    inputs: list[Path] = typer.Argument(..., help="Files or folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet."),
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted build is finished by running it again."),
    tokenizer: Path = typer.Option(..., help="The tokenizer.json of the model that will be trained."),
    seq_len: int = typer.Option(..., help="Tokens a row; also the most tokens that one interaction may have."),
    kind: Kind = typer.Option(Kind.single, help="single: packed rows, for fine-tuning. dialogues: for memory stages."),
    template: Template = typer.Option(Template.beta, help="alpha has only a query and an answer; beta all parts."),
    eval_fraction: float = typer.Option(0.02, help="Share of the records held out, chosen by hash of their text."),
    skip_other_kinds: bool = typer.Option(
        False,
        "--skip-other-kinds",
        help="Leave out and count records of the other kind: dialogues of several interactions with --kind single, "
        "single interactions with --kind dialogues.",
    ),
    as_json: bool = JSON,
) -> None:
    """Turn questions with answers, or whole dialogues, into shards for the stages after pre-training.

    Example: `rxt-dist data interactions chats/ --kind dialogues --tokenizer tokenizer.json --seq-len 1024 --out
    data/chats`. A record has `query` and `answer` (and `think`, `tool_call`, `tool_result`, `internal`), a list of
    such `interactions`, or chat `messages`. docs/interactions.md has the format, and what carries loss.
    """
    from data_prep.interactions.build import InteractionRequest, build_interactions

    request = InteractionRequest(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        kind=kind.value,
        template=template.value,
        eval_fraction=eval_fraction,
        skip_other_kinds=skip_other_kinds,
    )
    with progress_bytes("Building") as progress:
        result = build_interactions(request, progress)
    value = {
        "dataset": str(out),
        "kind": kind.value,
        "template": template.value,
        "seq_len": result.manifest.seq_len,
        "root_digest": result.manifest.root_digest,
        "units": result.units,
        "units_kept": result.units_kept,
        "read": vars(result.counts),
        "sources": {name: vars(report) for name, report in result.sources.items()},
    }
    emit(as_json, value, lambda: _show(out, result, kind))


def _show(out: Path, result: InteractionResult, kind: Kind) -> None:
    print_table(
        f"{out}: at most {result.manifest.seq_len} tokens an interaction, digest {result.manifest.root_digest[:16]}",
        ["source", "dialogues", "interactions", "tokens", "with loss"],
        [
            [name, f"{report.dialogues:,}", f"{report.interactions:,}", f"{report.tokens:,}",
             f"{100 * report.targets / max(report.tokens, 1):.1f} %"]
            for name, report in result.sources.items()
        ],
    )  # fmt: skip
    read = result.counts
    other = {Kind.single: "dialogues", Kind.dialogues: "single interactions"}[kind]
    print(
        f"Read {read.records:,} records with {read.interactions:,} interactions. Skipped {read.empty:,} empty, "
        f"{read.other_kind:,} {other}, {read.too_long:,} too long and {read.not_in_template:,} that the template "
        f"cannot express; shortened {read.shortened_queries:,} queries, left out {read.unanswered:,} unanswered ends "
        f"and {read.parts_left_out:,} parts. {result.units_kept} of {result.units} units were already finished."
    )
