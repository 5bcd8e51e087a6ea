"""A run that a life holds, and where in it the life begins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.checkpoint.verified import load_verified, verify_together
from rxt_dist.config.load import resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine
from rxt_dist.files import lasting_errors
from rxt_dist.stages.base import DataSource
from rxt_dist.train.candidates import Candidates
from rxt_dist.train.resume import Beginning, Position, choose_beginning, position_of
from rxt_dist.train.rollback import Past, joined_windows, read_past
from rxt_dist.train.run_dir import RunDirectory, require_checkpoint_of


@dataclass(frozen=True)
class Claim:
    """A run that this life holds.

    checkpoint: with which it begins, as far as is known; None: with first weights. Later ones are set aside once it
    was read, or if a person has named it, when the life begins. position: where training stands then.
    """

    config: RunConfig
    group: Collectives
    data: DataSource
    directory: RunDirectory
    store: CheckpointStore
    candidates: Candidates
    past: Past
    checkpoint: Checkpoint | None = None
    position: Position = field(default_factory=Position)
    beginning: Beginning = field(default_factory=Beginning)

    def at(self, checkpoint: Checkpoint | None) -> Claim:
        """The claim of a life that begins with this checkpoint.

        Raises:
            UserError: it is not one of this configuration or this data.
        """
        positions = [Position()]
        if checkpoint is not None:
            self.group.together(
                lambda: require_checkpoint_of(
                    self.directory.path, checkpoint.path.name, checkpoint.meta, training_hash(self.config)
                )
            )
            self.group.together(lambda: positions.append(position_of(checkpoint, self.data)))
        # Who names a checkpoint takes back what was decided after it.
        windows = () if self.is_named else self.past.windows
        position = replace(positions[-1], jumps=joined_windows(positions[-1].jumps, windows))
        beginning = choose_beginning(self.config, checkpoint, self.group)
        return replace(self, checkpoint=checkpoint, position=position, beginning=beginning)

    @property
    def is_named(self) -> bool:
        """Whether a person has named the checkpoint."""
        return self.candidates.is_named

    @property
    def is_finished(self) -> bool:
        """Whether an earlier life has done all that there is to do."""
        return self.group.any(self.group.rank == 0 and self.directory.finished_at(self.position.step))

    def settled(self) -> Claim:
        """This claim, or where the files of its checkpoint are damaged that of the next one: hashed where nothing will
        read them, of a finished run, or where a person has named one and is told before anything is written."""
        claim = self
        hashed = self.is_finished or self.is_named
        while hashed and claim.checkpoint is not None:
            problems = verify_together(claim.group, claim.store, claim.checkpoint.step)[1]
            if not problems:
                break
            claim = claim.after(problems)
        return claim

    def loaded(self, engine: Engine, frozen: FrozenWeights, say: Callable[[str], None]) -> Claim:
        """Read the checkpoint into the engine; where its files are damaged, the newest that is whole.

        Args:
            say: takes what there is to say of checkpoints, before the next one is read.

        Returns:
            The claim of a life that begins with what was read.

        Raises:
            CheckpointError: none is whole, or the state is of another model.
        """
        claim = self
        claim.candidates.tell(say)
        while claim.checkpoint is not None:
            problems = load_verified(engine, frozen, claim.store, claim.checkpoint, claim.position.applied)
            if not problems:
                break
            claim = claim.after(problems)
            claim.candidates.tell(say)
        return claim

    def after(self, problems: list[str]) -> Claim:
        """The claim of a life that begins with the checkpoint before this one, whose files are damaged."""
        assert self.checkpoint is not None
        return self.at(self.candidates.after(self.checkpoint, problems))


def claim_run(
    stack: ExitStack, config: RunConfig, group: Collectives, data: DataSource, from_step: int | None
) -> Claim:
    """Take the run for this life until `stack` is closed; rank 0 does, for all. Whatever refuses it leaves the
    directory as it was.

    Raises:
        UserError: another process holds it, or it cannot be gone on with.
    """
    directory, trained = RunDirectory(config.directory), training_hash(config)

    def take() -> None:
        if group.rank:
            return
        with lasting_errors(directory.path):
            directory.check(resolved_yaml(config), trained)
            stack.enter_context(directory.locked())
            # Again, now that nobody else can change it.
            directory.check(resolved_yaml(config), trained)

    group.together(take)
    store = _store(config, directory)
    past = read_past(group, store, directory.jumps)
    candidates = Candidates(group, store, past.up_to, from_step)
    claim = Claim(config, group, data, directory, store, candidates, past)
    first = candidates.first()
    if first is None:
        group.together(lambda: None if group.rank else _require_nothing_saved(directory, store))
    return claim.at(first).settled()


def _require_nothing_saved(directory: RunDirectory, store: CheckpointStore) -> None:
    with lasting_errors(directory.path):
        directory.require_nothing_saved(store.aside())


def _store(config: RunConfig, directory: RunDirectory) -> CheckpointStore:
    kept = config.checkpoint
    return CheckpointStore(
        directory.checkpoints,
        kept.keep,
        directory.require_life,
        milestone_tokens=kept.milestone_tokens,
        keep_best=kept.keep_best,
    )
