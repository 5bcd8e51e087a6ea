"""`rxt-dist data`: from raw text to verified shards, and looking at what is in them.

A verb a module; heavy imports stand inside the verbs, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import typer

from rxt_dist.commands.data.build import build
from rxt_dist.commands.data.clean import clean
from rxt_dist.commands.data.diff import diff
from rxt_dist.commands.data.export_megatron import export_megatron
from rxt_dist.commands.data.import_megatron import import_megatron
from rxt_dist.commands.data.interactions import interactions
from rxt_dist.commands.data.mix import mix
from rxt_dist.commands.data.plan import plan
from rxt_dist.commands.data.repack import repack
from rxt_dist.commands.data.sample import sample
from rxt_dist.commands.data.show import show
from rxt_dist.commands.data.stats import stats
from rxt_dist.commands.data.tokenizer import tokenizer
from rxt_dist.commands.data.verify import verify


def in_words(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with whatever the system refuses it told as an error that a person can act on.

    Not so in training: there a disk that fails for a moment is a crash, after which a launcher starts again.
    """

    @wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        from rxt_dist.files import access_errors

        with access_errors():
            verb(*arguments, **options)

    return run


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Turn text into token shards, check them, look at them.

    Your own text in two commands: `rxt-dist data build my_texts/ --out data/mine`, then name `data/mine` in a run.
    Nothing to train on yet? `rxt-dist data sample corpus/` writes a small English and Polish corpus.""",
)

for verb in (
    sample,
    tokenizer,
    clean,
    plan,
    mix,
    build,
    verify,
    stats,
    show,
    diff,
    repack,
    interactions,
    import_megatron,
    export_megatron,
):
    app.command()(in_words(verb))
