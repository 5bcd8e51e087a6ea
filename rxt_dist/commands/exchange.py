"""`rxt-dist export` and `rxt-dist import`: weights as folders that others load, and theirs as ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from rxt_dist.checkpoint.export import Format
    from rxt_dist.checkpoint.importing import Angles

_DTYPES = ("float32", "bfloat16")
_FORMATS = ("rxt", "rxlm")


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, for example runs/demo.")],
    out: Annotated[Path, typer.Option(help="Folder to make; what is there already is refused.")],
    form: Annotated[
        str, typer.Option("--format", help="rxt: our names; rxlm: as the public package loads it.")
    ] = "rxt",
    step: Annotated[int | None, typer.Option(help="Step to export; default: the newest valid one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, as the weights are learnt, or bfloat16.")] = "float32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the model; default: that of the run's dataset.")
    ] = None,
) -> None:
    """Write the weights of RUN as safetensors, with configuration, tokenizer and model card.

    `rxt-dist chat OUT` talks with an export of a model that has memory attention; another run can begin with one of
    format rxt: start={export: OUT, parts: [...]}.

    Example: rxt-dist export runs/demo --out exports/demo --dtype bfloat16
    """
    import torch

    from rxt_dist.checkpoint.export import Wanted, export_run
    from rxt_dist.errors import CheckpointError

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    _require("--dtype", dtype, _DTYPES)
    _require("--format", form, _FORMATS)
    if not (run_dir / "checkpoints").is_dir():
        raise CheckpointError(
            f"{run_dir} is not a run directory with checkpoints. Give the folder that contains config.resolved.yaml, "
            "for example runs/demo."
        )
    wanted = Wanted(run_dir, out, cast("Format", form), step, types[dtype], tokenizer)
    for record in export_run(wanted, typer.echo):
        typer.echo(f"{out / record.name}  {record.bytes / 1e6:,.1f} MB")


def import_weights(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Published folders: a whole system, or its parts.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; what is there already is refused.")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json of the model, where DIR has none.")] = None,
    rope_angles: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the type of the decoder's weights.")
    ] = None,
) -> None:
    """Make an export of ours from published weights, and name the switches that they need.

    Every tensor must have its place and its shape. Buffers are passed over; experts may stand one by one or stacked.

    Example: rxt-dist import downloads/RxT-Beta-Micro-Supervised --tokenizer micro.json --out exports/micro
    """
    from rxt_dist.checkpoint.importing import import_published

    if rope_angles is not None:
        _require("--rope-angles", rope_angles, _DTYPES)
    model = import_published(folders, out, tokenizer, cast("Angles | None", rope_angles), typer.echo)
    typer.echo(f"{out}: {model.name}, {model.layers} stateful layers of width {model.dim}")


def _require(option: str, value: str, known: tuple[str, ...]) -> None:
    from rxt_dist.errors import ConfigError

    if value not in known:
        raise ConfigError(f"{option} is '{value}', but it is {' or '.join(known)}.")
