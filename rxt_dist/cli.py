"""The `rxt-dist` command line: verbs are listed here, each lives in the `commands` of the room whose verb it is.

Importing this module costs no torch: a verb imports what it needs when it runs, so that `--help` answers at once. The
verbs are named as text, because the package imports nothing of the rooms around it.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from rxt_dist import __version__
from rxt_dist.errors import ConfigError, ExitCode, UserError
from rxt_dist.leaving import run_program
from rxt_dist.lives import leave_words

# Each is the function of a verb or a group of verbs.
VERBS = {
    "train": "rxt_dist.commands.train:train",
    "plan": "rxt_dist.commands.plan:plan",
    "doctor": "rxt_dist.commands.doctor:doctor",
    "data": "data_prep.commands:app",
    "diff": "rxt_dist.commands.diff:diff",
    "report": "rxt_dist.commands.report:report",
    "checkpoint": "rxt_dist.commands.checkpoint:app",
    "export": "rxt_dist.commands.exchange:export",
    "import": "rxt_dist.commands.exchange:import_weights",
    "chat": "rxt_dist.commands.answer:chat",
    "generate": "rxt_dist.commands.answer:generate",
    "evaluate": "rxt_dist.commands.answer:evaluate",
    "config": "rxt_dist.commands.config:app",
    "launch": "launch.commands:app",
    "pipeline": "launch.commands:pipeline",
}

app = typer.Typer(
    name="rxt-dist",
    help="Distributed mixture-of-experts pre-training of Reactive Transformers.",
    no_args_is_help=True,
    add_completion=False,
    # An error that is not the user's is a bug, and a bug's traceback is wanted whole.
    pretty_exceptions_enable=False,
)
for name, where in VERBS.items():
    module, attribute = where.split(":")
    verb = getattr(import_module(module), attribute)
    if isinstance(verb, typer.Typer):
        app.add_typer(verb, name=name)
    else:
        app.command(name)(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Distributed mixture-of-experts pre-training of Reactive Transformers."""


# What typer exits with when a verb, an option or an argument is wrong.
_USAGE = 2


def _refuse(error: UserError) -> NoReturn:
    # Every rank of a run refuses the same configuration, so one of them says it; what the system refuses, one alone may
    # have met. Our launcher collects what all say, and says it once.
    common = error.common or (isinstance(error, ConfigError) and not isinstance(error.__cause__, OSError))
    if leave_words(f"error: {error}\n"):
        pass
    elif not common or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def program() -> None:
    """`main` as the whole of a process."""
    run_program(main)


def main() -> None:
    """Run the command line; errors that a person can act on end in one paragraph and their own exit code."""
    try:
        app()
    except UserError as error:
        _refuse(error)
    except SystemExit as end:
        sys.exit(ExitCode.CONFIG if end.code == _USAGE else end.code)
    except Exception:
        if not leave_words(traceback.format_exc()):
            raise
        sys.exit(1)
