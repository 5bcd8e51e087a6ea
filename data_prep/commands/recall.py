"""`rxt-dist data recall`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from data_prep.commands.common import JSON, emit
from rxt_dist.errors import ConfigError


class Variety(StrEnum):
    small = "small"
    full = "full"


def recall(
    out: Path = typer.Argument(
        ..., help="New folder for the dialogues; an interrupted call is finished by repeating it."
    ),
    languages: str = typer.Option("en,pl", help="Languages, with commas between them."),
    distances: str = typer.Option("1,2,3,4,6,8", help="Turns from telling to asking; a file to train on for each."),
    held_out_distances: str = typer.Option("12,16", help="Distances that are only evaluated; empty for none."),
    facts: int = typer.Option(3, min=1, help="Most facts that a dialogue tells, each of which it asks for once."),
    fillers: int = typer.Option(2, min=0, help="Most turns of other talk beyond those that the distance needs."),
    turns: int | None = typer.Option(None, min=2, help="Most turns of a dialogue; default: what the others come to."),
    count: int = typer.Option(5000, min=1, help="Dialogues of a file to train on."),
    held_out_count: int = typer.Option(400, min=1, help="Dialogues of a held-out file."),
    held_out_values: float = typer.Option(0.1, help="Share of the names, places, ... that are only evaluated."),
    variety: Variety = typer.Option(Variety.full, help="small: six kinds of facts, 30 values and one wording each."),
    values: int | None = typer.Option(None, help="Values of each kind of facts, at most. [default: all]"),
    seed: int = typer.Option(0, help="Another seed gives other dialogues; held-out values stay the same."),
    name: str = typer.Option("recall", help="What the sources are called by: NAME-d4-en."),
    as_json: bool = JSON,
) -> None:
    """Write dialogues that tell facts and ask for them a known number of turns later, to train and measure a memory.

    Example: `rxt-dist data recall talks/ --distances 1,2,4,8`, then `rxt-dist data interactions talks/ --kind dialogues
    --tokenizer tokenizer.json --seq-len 64 --out data/talks`. Each distance is a source (recall-d4-en), so that the
    phases of `data.mixture` can begin with the near ones; what is held out is read by evaluation alone.
    """
    from data_prep.recall.make import RecallRequest, write_recall

    request = RecallRequest(
        languages=tuple(filter(None, languages.replace(" ", "").split(","))),
        distances=_numbers("--distances", distances),
        held_out_distances=_numbers("--held-out-distances", held_out_distances),
        facts=facts,
        fillers=fillers,
        turns=turns,
        count=count,
        held_out_count=held_out_count,
        held_out_values=held_out_values,
        variety=variety.value,
        values=values,
        seed=seed,
        name=name,
    )
    files = write_recall(out, request)
    sources = [f"{part.source}-{part.language}" for part, _ in files if not part.held_out]

    def show() -> None:
        dialogues = sum(count for _, count in files)
        print(f"Wrote {dialogues:,} dialogues of up to {request.longest} turns, in {len(files)} files, to {out}.")
        print(f"Sources to train on: {', '.join(sources)}.")
        print(
            f"Next: rxt-dist data interactions {out} --kind dialogues --tokenizer tokenizer.json --seq-len 64 --out DIR"
        )

    written = {part.file: {"source": f"{part.source}-{part.language}", "dialogues": count, "held_out": part.held_out}
               for part, count in files}  # fmt: skip
    emit(as_json, {"out": str(out), "turns": request.longest, "files": written}, show)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; it is whole numbers with commas between them, as 1,2,4,8.") from None
