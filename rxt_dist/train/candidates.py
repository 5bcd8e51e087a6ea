"""Which checkpoint a run goes on from: the newest that is sound, or one that a person names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.checkpoint.verified import described_together, verify_together
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError


class Candidates:
    """The checkpoints that a life may go on from, one after another, newest first; all ranks together.

    What is offered has a manifest that can be believed, and all its files in their sizes. Whether they are whole shows
    when they are read: one that is found damaged then makes room for the next.

    Args:
        up_to: the last step whose checkpoint is of the present history; None: all are.
        named: the step that alone is wanted; None: the newest is.

    Attributes:
        remarks: why others were passed over, and what else there is to say, until somebody has said it.

    Raises:
        CheckpointError: there is none of the named step, or it is of a history that was given up.
    """

    def __init__(self, group: Collectives, store: CheckpointStore, up_to: int | None, named: int | None = None) -> None:
        self._group, self._store, self._named = group, store, named
        self.remarks: list[str] = []
        self._rejected: list[str] = []

        def look() -> tuple[list[int], list[str]]:
            said: list[str] = []
            store.check_pointer(said.append)
            return list(store.steps()), said

        steps, said = group.together(lambda: look() if group.rank == 0 else None)[0]
        self._any = bool(steps)
        if named is not None:
            self._left = [_required(named, store, steps, up_to)]
            return
        self._left = [step for step in steps if up_to is None or step <= up_to]
        given_up = steps[len(self._left) :]
        self.remarks += said
        self.remarks += [f"Checkpoint {store.folder(step)} is of a history that was given up." for step in given_up]

    @property
    def is_named(self) -> bool:
        """Whether a person has named the one that is wanted."""
        return self._named is not None

    def first(self) -> Checkpoint | None:
        """The first of them; None where the run has no checkpoint at all.

        Raises:
            CheckpointError: there are some, but none is whole. Starting again from nothing would destroy them and the
                run's history, when perhaps a disk is only not mounted.
        """
        return self._next() if self._any else None

    def after(self, damaged: Checkpoint, problems: Sequence[str]) -> Checkpoint:
        """The next one, in place of one whose files turned out to be damaged.

        Raises:
            CheckpointError: none is left.
        """
        self._reject(damaged.step, problems)
        return self._next()

    def tell(self, say: Callable[[str], None]) -> None:
        """Say all remarks, each once."""
        for remark in self.remarks:
            say(remark)
        self.remarks.clear()

    def _next(self) -> Checkpoint:
        while self._left:
            step = self._left.pop()
            checkpoint, problems = described_together(self._group, self._store, step)
            if checkpoint is None:
                self._reject(step, problems)
                continue
            if checkpoint.is_suspect:
                self.remarks.append(f"Checkpoint {checkpoint.path} was made while losses were suspect.")
            return checkpoint
        if self._named is not None:
            raise CheckpointError(f"{' '.join(self._rejected)} Name another step.")
        raise CheckpointError(
            f"No checkpoint in {self._store.directory} is valid, and this run will not start again from nothing over "
            f"them. {' '.join(self._rejected)} Restore the files; to begin anew remove "
            f"{self._store.directory.parent}, or give the run another name."
        )

    def _reject(self, step: int, problems: Sequence[str]) -> None:
        self._rejected.append(_rejection(self._store, step, problems))
        self.remarks.append(self._rejected[-1])


def newest_sound(
    group: Collectives, store: CheckpointStore, *, up_to: int | None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that was hashed and not made while losses were suspect, and why later ones were passed
    over; all ranks together.

    Args:
        up_to: the last step that is looked at; None: all are.
    """
    steps = group.together(lambda: list(store.steps()) if group.rank == 0 else None)[0]
    remarks = []
    for step in reversed([step for step in steps if up_to is None or step <= up_to]):
        checkpoint, problems = verify_together(group, store, step)
        if checkpoint is None:
            remarks.append(_rejection(store, step, problems))
        elif checkpoint.is_suspect:
            remarks.append(f"Checkpoint {store.folder(step)} was made while losses were suspect.")
        else:
            return checkpoint, remarks
    return None, remarks


def _required(named: int, store: CheckpointStore, steps: Sequence[int], up_to: int | None) -> int:
    if up_to is not None and named > up_to:
        raise CheckpointError(
            f"--from names step {named}, which is of a history that this run has gone back from (see jumps.json). Name "
            f"an earlier one, of step {up_to} at most."
        )
    if named not in steps:
        raise CheckpointError(
            f"--from names step {named}, of which {store.directory} has no committed checkpoint; its steps are: "
            f"{', '.join(map(str, steps)) or 'none'}."
        )
    return named


def _rejection(store: CheckpointStore, step: int, problems: Sequence[str]) -> str:
    return f"Checkpoint {store.folder(step)} is rejected: {'; '.join(problems)}."
