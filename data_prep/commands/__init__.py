"""`rxt-dist data`: from raw text to verified shards, and looking at what is in them.

A verb a module; heavy imports stand inside the verbs, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import typer

from data_prep.commands.build import build
from data_prep.commands.clean import clean
from data_prep.commands.diff import diff
from data_prep.commands.export_megatron import export_megatron
from data_prep.commands.import_megatron import import_megatron
from data_prep.commands.interactions import interactions
from data_prep.commands.mix import mix
from data_prep.commands.plan import plan
from data_prep.commands.recall import recall
from data_prep.commands.repack import repack
from data_prep.commands.sample import sample
from data_prep.commands.show import show
from data_prep.commands.stats import stats
from data_prep.commands.tokenizer import tokenizer
from data_prep.commands.verify import verify


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
    recall,
    interactions,
    import_megatron,
    export_megatron,
):
    app.command()(in_words(verb))
