"""What `INPUTS... | DATA.yaml [a.b=c ...]` on a command line means, for the verbs that read text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.units import Unit
    from rxt_dist.config.corpus import BuildConfig

CORPUS = typer.Argument(
    ...,
    help="Files or folders: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow; "
    "or one DATA.yaml and settings for it such as build.vocab_size=32768.",
)


def read_corpus(inputs: list[str]) -> tuple[BuildConfig, tuple[Unit, ...]]:
    """The build configuration (all defaults for plain inputs) and where its text is.

    Raises:
        ConfigError: a data file that is wrong, has no `build`, or stands beside other inputs.
        DataError: an input that cannot be read.
    """
    from data_prep.units import make_plan
    from rxt_dist.config.corpus import BuildConfig
    from rxt_dist.config.load import load_data

    if not inputs[0].endswith((".yaml", ".yml")):
        return BuildConfig(), make_plan(BuildConfig(), [Path(item) for item in inputs]).units
    wrong = [item for item in inputs[1:] if "=" not in item]
    if wrong:
        raise ConfigError(f"One data file at a time, without other inputs: {', '.join(wrong)} cannot stand beside it.")
    build = load_data(Path(inputs[0]), inputs[1:]).build
    if build is None:
        raise ConfigError(f"{inputs[0]} has no `build`, so it does not say where text is. Name the texts themselves.")
    return build, make_plan(build).units
