"""Checkpoints that are written while training goes on: one thread on each rank.

The main threads go on while the state is copied, and change it when it is (`before_update`). The threads tell each
other through the run's store, since collective operations belong to the main threads: rank 0 makes the folder, every
rank writes its files and announces their records, rank 0 commits when it has those of all. What is not announced is not
committed, so a rank that dies, a store that is gone or a save that is given up leaves a `.tmp` folder and nothing else.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rxt_dist.checkpoint.checksum import wrapped
from rxt_dist.checkpoint.daemons import processors
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.host_copy import HostCopy
from rxt_dist.checkpoint.state import begin, own_share
from rxt_dist.checkpoint.store import CHECKSUM, CheckpointStore, FileRecord
from rxt_dist.checkpoint.writing import Share, writing_errors
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError, UserError, error_class

# How often a thread that waits for others looks whether its save was given up.
_POLL = timedelta(seconds=1)
# A rank that has said nothing for so long is not going to.
_PATIENCE_SECONDS = 3600.0
# Priority of the writing threads: on processors that are all busy they get a tenth of what training gets.
_NICE = 10
# Files that are written at once beside training, where there are processors for it; else one after another.
_MOST_THREADS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a save. On ranks other than 0: of their part of it.

    bytes: of all files; error: None when it is committed.
    seconds: from the copy until the commit.
    """

    step: int
    bytes: int
    seconds: float
    error: UserError | None


class BackgroundSaves:
    """Copies and writes the state of one life of a run, one save at a time. All ranks call its methods together."""

    def __init__(self, engine: Engine, frozen: FrozenWeights, store: CheckpointStore) -> None:
        self._engine, self._frozen, self._store = engine, frozen, store
        self._copy = HostCopy(engine.device)
        self._channel: _Channel | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._given_up = threading.Event()
        self._count = 0

    @property
    def running(self) -> bool:
        """Whether a save was started whose outcome nobody has asked for."""
        return self._thread is not None

    @property
    def outcome(self) -> Outcome | None:
        """Of the save that was started last, once this rank knows it."""
        return self._outcome

    def start(self, step: int, meta: Mapping[str, Any]) -> None:
        """Begin to copy the state and to write the copy. The state may not change before `before_update` was called.

        Args:
            meta: see `save_state`.
        """
        assert not self.running, "two saves at once"
        if self._channel is None:
            self._channel = _open_channel(self._engine, self._given_up)
        share = own_share(self._engine, self._frozen)
        frozen = sum(1 for _ in self._frozen.fragments())
        copied = self._copy.begin(share, frozen)
        self._count += 1
        self._outcome = None
        arguments = self._channel.of_save(self._count), copied, step, meta, time.monotonic()
        # It must not keep a process alive that a person or a scheduler wants to end.
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"save-{step}", daemon=True)
        self._thread.start()

    def before_update(self) -> None:
        """Weights and moments change after this: wait for the copy of them, if one is being made."""
        self._copy.before_change()

    def device_wait(self) -> float:
        """Seconds for which the device waited for the copy of the last save, beside those of the host in
        `before_update`."""
        return self._copy.device_wait()

    def wait(self) -> Outcome:
        """Wait for the save that is being written; what became of it on this rank."""
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        assert self._outcome is not None
        return self._outcome

    def close(self, seconds: float) -> None:
        """Give a save that is being written `seconds` to end by itself, then give it up, and free the memory."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._given_up.set()
            self._thread.join(3 * _POLL.total_seconds())
            if self._thread.is_alive():  # It hangs in the file system, and still reads the copy.
                return
            self._thread = None
        self._copy.close()

    def _write(self, channel: _Channel, share: Share, step: int, meta: Mapping[str, Any], started: float) -> None:
        size, error = 0, None
        _prefer_training()
        try:
            work = self._lead if share.rank == 0 else self._follow
            size = writing_errors(share.rank, lambda: work(channel, share, step, meta))
        except UserError as failure:
            error = failure
            if share.rank == 0:
                self._store.discard(step)
        self._outcome = Outcome(step, size, time.monotonic() - started, error)

    def _lead(self, channel: _Channel, share: Share, step: int, meta: Mapping[str, Any]) -> int:
        """Rank 0's part. Returns the bytes that were committed."""
        try:
            needed = share.bytes + sum(channel.hear("bytes", rank) for rank in channel.others)
            begin(self._store, step, needed)
        except BaseException:
            channel.tell("begun", False)
            raise
        channel.tell("begun", True)
        records, own = self._write_own(share, step)
        checksums = [own]
        for rank in channel.others:
            said = channel.hear("written", rank)
            if said["error"] is not None:
                kind, text = said["error"]
                raise (error_class(kind) or CheckpointError)(text)
            records += [FileRecord(**record) for record in said["records"]]
            checksums.append(said["checksum"])
        self._store.commit(step, records, {**meta, CHECKSUM: wrapped(sum(checksums))})
        return sum(record.bytes for record in records)

    def _follow(self, channel: _Channel, share: Share, step: int, meta: Mapping[str, Any]) -> int:
        """The part of every other rank. Returns the bytes that it wrote."""
        channel.tell("bytes", share.bytes)
        if not channel.hear("begun", 0):
            return 0  # Rank 0 has failed, and says why.
        try:
            records, checksum = writing_errors(share.rank, lambda: self._write_own(share, step))
            written = {"records": [asdict(record) for record in records], "checksum": checksum, "error": None}
            channel.tell("written", written)
        except UserError as error:
            channel.tell("written", {"error": [type(error).__name__, str(error)]})
            raise
        return sum(record.bytes for record in records)

    def _write_own(self, share: Share, step: int) -> tuple[list[FileRecord], int]:
        """Write this rank's files when the copy is there: their records, and its part of the checksum."""
        self._copy.complete()
        threads = _threads()
        return share.write(self._store, step, threads), share.checksum(threads)


@dataclass(frozen=True)
class _Channel:
    """What the threads of all ranks tell each other about one save.

    prefix: its own for every life and save: some stores outlive a life.
    """

    store: dist.Store | None
    prefix: str
    rank: int
    world_size: int
    given_up: threading.Event

    @property
    def others(self) -> range:
        """All ranks but the first."""
        return range(1, self.world_size)

    def of_save(self, number: int) -> _Channel:
        """The same, for one save."""
        return _Channel(self.store, f"{self.prefix}/{number}", self.rank, self.world_size, self.given_up)

    def tell(self, what: str, value: Any) -> None:
        """Say something, once."""
        if self.store is not None:
            self.store.set(f"{self.prefix}/{what}/{self.rank}", json.dumps(value))

    def hear(self, what: str, rank: int) -> Any:
        """Wait for what another rank says.

        Raises:
            CheckpointError: it does not say it, or the save was given up.
        """
        assert self.store is not None
        key, end = f"{self.prefix}/{what}/{rank}", time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self.store.wait([key], _POLL)
                break
            except dist.DistStoreError as error:  # Nothing within a poll.
                if self.given_up.is_set() or time.monotonic() > end:
                    raise CheckpointError(f"The save was given up: rank {rank} did not say '{what}'.") from error
        value = json.loads(self.store.get(key))
        if what == "written":  # Read once; the store keeps in memory whatever it is not told to forget.
            self.store.delete_key(key)
        return value


def _threads() -> int:
    """How many may write beside training: more than half of the processors would make it wait, at any priority."""
    return max(1, min(_MOST_THREADS, processors() // 2))


def _prefer_training() -> None:
    """Let this thread, and those that it starts, take what processors have to spare."""
    with suppress(OSError, AttributeError):  # A matter of Linux.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _open_channel(engine: Engine, given_up: threading.Event) -> _Channel:
    ranks = engine.ranks
    life = ranks.gather(uuid.uuid4().hex)[0]
    return _Channel(ranks.open_channel("checkpoint"), life, ranks.rank, ranks.world_size, given_up)
