"""`rxt-dist data interactions`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_prep.commands.common import (
    JSON,
    TASK,
    TASKS,
    WORKERS,
    emit,
    emit_unfinished,
    print_table,
    progress_units,
    say,
)

if TYPE_CHECKING:
    from data_prep.interactions.build import InteractionResult
    from rxt_dist.data.dialogues import AnyManifest


class Kind(StrEnum):
    single = "single"
    dialogues = "dialogues"


class Template(StrEnum):
    alpha = "alpha"
    beta = "beta"


SKIP_OTHER_KINDS = typer.Option(
    False,
    "--skip-other-kinds",
    help="Leave out and count records of the other kind: dialogues of several interactions with --kind single, "
    "single interactions with --kind dialogues.",
)
SPLIT_DIALOGUES = typer.Option(
    False,
    "--split-dialogues",
    help="With --kind single: build each interaction of a dialogue by itself, for stages whose memory is the "
    "interaction's own (sft).",
)
COLUMN = typer.Option(
    [], help="A field that has another name in the records, as query=question; may be given several times."
)


def interactions(
    inputs: list[Path] = typer.Argument(..., help="Files or folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow."),
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted build is finished by running it again."),
    tokenizer: Path = typer.Option(..., help="The tokenizer.json of the model that will be trained."),
    seq_len: int = typer.Option(..., help="Tokens a row; also the most tokens that one interaction may have."),
    kind: Kind = typer.Option(Kind.single, help="single: packed rows, for fine-tuning. dialogues: for memory stages."),
    template: Template = typer.Option(Template.beta, help="alpha has only a query and an answer; beta all parts."),
    eval_fraction: float = typer.Option(0.02, help="Share of the records held out, chosen by hash of their text."),
    skip_other_kinds: bool = SKIP_OTHER_KINDS,
    split_dialogues: bool = SPLIT_DIALOGUES,
    column: list[str] = COLUMN,
    workers: int = WORKERS,
    task: int | None = TASK,
    tasks: int | None = TASKS,
    as_json: bool = JSON,
) -> None:
    """Turn questions with answers, or whole dialogues, into shards for the stages after pre-training.

    Example: `rxt-dist data interactions chats/ --kind dialogues --tokenizer tokenizer.json --seq-len 1024 --out
    data/chats`. A record has `query` and `answer` (and `think`, `tool_call`, `tool_result`, `internal`), a list of
    such `interactions`, or chat `messages`. docs/interactions.md has the format, and what carries loss.

    Files are what workers share: one is read by one process. As a job array, on nodes that share the folder: add
    `--task $SLURM_ARRAY_TASK_ID --tasks 8`; the task that ends last finishes the dataset.
    """
    from data_prep.interactions.build import InteractionRequest, build_interactions
    from data_prep.interactions.columns import Columns

    request = InteractionRequest(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        kind=kind.value,
        template=template.value,
        eval_fraction=eval_fraction,
        skip_other_kinds=skip_other_kinds,
        split_dialogues=split_dialogues,
        columns=Columns.parse(column),
        workers=workers,
        task=task,
        tasks=tasks,
    )
    with progress_units() as progress:
        result = build_interactions(request, say, progress)
    manifest = result.manifest
    if manifest is None:
        emit_unfinished(as_json, out, result)
        return
    asked = {"dataset": str(out), "kind": kind.value, "template": template.value}
    value = asked | {
        "seq_len": manifest.seq_len,
        "root_digest": manifest.root_digest,
        "units": result.units,
        "units_kept": result.units_kept,
        "read": vars(result.counts),
        "sources": {name: vars(report) for name, report in result.sources.items()},
    }
    emit(as_json, value, lambda: _show(out, manifest, result, kind))


def _show(out: Path, manifest: AnyManifest, result: InteractionResult, kind: Kind) -> None:
    print_table(
        f"{out}: at most {manifest.seq_len} tokens an interaction, digest {manifest.root_digest[:16]}",
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
