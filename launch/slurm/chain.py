"""A chain of runs as jobs: one for each link, which waits until the one before is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.pipeline import check
from launch.slurm.submit import Wish, living_job, render, submit
from rxt_dist.config.chain import Chain, DataJob
from rxt_dist.config.run import RunConfig
from rxt_dist.errors import ConfigError, UserError
from rxt_dist.files import access_errors
from rxt_dist.finished import is_finished
from rxt_dist.train.chain_dir import ChainDirectory

# From a run and the directories that have to be finished first to what is submitted.
MakeWish = Callable[[RunConfig, list[Path]], Wish]


@dataclass(frozen=True)
class ChainWish:
    """What a person wants to have submitted: the chain as its file and overrides give it, and how a run becomes a
    wish, with the options of its job."""

    file: Path
    overrides: Sequence[str]
    chain: Chain
    make: MakeWish

    def left(self) -> list[tuple[str, RunConfig, list[Path]]]:
        """(link, run, directories that it waits for) of what is not finished, in order: each for the one before."""
        found: list[tuple[str, RunConfig, list[Path]]] = []
        for name, run in self.chain.runs.items():
            if not is_finished(run.directory):
                found.append((name, run, [before.directory.absolute() for _, before, _ in found[-1:]]))
        return found

    def check(self) -> None:
        """Refuse what would stop a link.

        Raises:
            UserError: as the check of a chain, with the ranks of the jobs; or data is not made yet.
        """
        folder = ChainDirectory(self.chain)
        folder.require_free()
        to_make = [
            link.name for link in self.chain.links if isinstance(link.work, DataJob) and not folder.is_done(link)
        ]
        if to_make:
            raise ConfigError(
                f"link '{to_make[0]}' makes data, which a training job does not: make it first (`rxt-dist pipeline "
                f"{self.file}` on one machine, ended when its data jobs are done), or name data that is there."
            )
        ranks = {self.make(run, []).config.cluster.ranks for run in self.chain.runs.values()}
        check(self.file, self.overrides, ranks.pop() if len(ranks) == 1 else None)


def render_chain(wish: ChainWish, warn: Callable[[str], None]) -> str:
    """The script of the next link, as a submission would write it; nothing is written.

    Args:
        warn: told which links would follow.
    """
    wish.check()
    left = wish.left()
    if not left:
        warn(f"chain '{wish.chain.name}' is finished")
        return ""
    for name, _, _ in left[1:]:
        warn(f"link '{name}' would be submitted too, and wait")
    return render(wish.make(left[0][1], []), warn)


def submit_chain(wish: ChainWish, say: Callable[[str], None]) -> list[str]:
    """Submit a job for each link that is not finished and has none.

    Returns:
        the ids of the new jobs.

    Raises:
        UserError: whatever refuses a link; links before it stay submitted.
    """
    wish.check()
    jobs: list[str] = []
    with access_errors(wish.chain.directory), ChainDirectory(wish.chain).taken():
        for name, run, after in wish.left():
            if living_job(run.directory.absolute()) is not None:
                say(f"link '{name}' has a job already")
                continue
            try:
                own = submit(wish.make(run, after), say)
            except UserError as error:
                kept = f" Links before it stay submitted ({', '.join(jobs)})." if jobs else ""
                raise type(error)(f"link '{name}': {error}{kept}") from error
            say(f"link '{name}': job {', '.join(own)}" + (f", after {after[0]}" if after else ""))
            jobs += own
    return jobs
