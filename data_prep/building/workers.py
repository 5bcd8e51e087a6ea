"""Units through processes: claimed one by one, in bounded memory, with one progress for all.

A unit is worked on under a lock of its own (`units/.<unit>.lock`), so that processes and hosts that share a folder do
not do the same work twice; where the file system has no locks they may, which costs time and changes nothing. Workers
end with their parent, and are replaced when they keep too much memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from data_prep.building.folder import KEPT, lock_path, remove_leftovers
from data_prep.building.memory import free_memory, resident_bytes, return_large_blocks
from data_prep.building.processes import safe_path, worker_context
from data_prep.units import Unit
from rxt_dist.errors import DataError, MemoryLimitError, UserError
from rxt_dist.files import access_errors
from rxt_dist.locks import Lock, locked

Report = Callable[[int, int], None]
"""Told (bytes of text passed, tokens made) of the unit so far."""

# A worker that between two units holds so much more than when it began is replaced: what it works on comes on top.
RECYCLE_BYTES = 224 << 20

_REPORT_SECONDS = 0.25
_HELD_SECONDS = 5.0  # how long a unit that another process holds is waited for, when nothing else is left to do
_RETRY_SECONDS = 0.2
_END_SECONDS = 10.0  # how long a worker that does not answer any more may take to end
_UNKNOWN_CODE = 255  # what multiprocessing says of a worker when the server that forked it has gone too


class UnitPass(Protocol):
    """What is done with each unit in one pass over them, such as surveying, building or comparing them. It travels to
    worker processes, so it is small and can be pickled."""

    @property
    def out(self) -> Path:
        """The dataset folder."""
        ...

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit needs no more work."""
        ...

    def open(self) -> Callable[[Unit, Report], None]:
        """Load what the work needs (once in each process) and return the work."""
        ...


@dataclass
class Progress:
    """How far a pass over the units is; `running` maps a unit to its (bytes of text, tokens) so far."""

    what: str
    units: int
    total_bytes: int
    done: int = 0
    failed: int = 0
    done_bytes: int = 0
    done_tokens: int = 0
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def bytes(self) -> int:
        """Bytes of text passed since the start."""
        return min(self.done_bytes + sum(size for size, _ in self.running.values()), self.total_bytes)

    @property
    def tokens(self) -> int:
        """Tokens made since the start."""
        return self.done_tokens + sum(tokens for _, tokens in self.running.values())

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def passed(self, unit: Unit, text_bytes: int, tokens: int) -> None:
        """A unit is so far. What the plan expects of it is a bound: packed inputs may hold more."""
        self.running[unit.name] = (min(text_bytes, unit.text_bytes), tokens)

    def finished(self, unit: Unit) -> None:
        """A unit is committed."""
        _, tokens = self.running.pop(unit.name, (0, 0))
        self.done += 1
        self.done_bytes += unit.text_bytes
        self.done_tokens += tokens


Show = Callable[[Progress], None]


def run_units(
    unit_pass: UnitPass, units: Iterable[Unit], workers: int, progress: Progress, show: Show, patient: bool
) -> int:
    """Work on these units with up to `workers` processes (1: in this one).

    Args:
        patient: wait for units that other processes hold, for as long as they do.

    Returns:
        How many units were left to the processes that hold them.

    Raises:
        UserError: the first error of any unit. The rest is stopped; finished units stay.
        MemoryLimitError: a worker was killed, or got no more memory.
        DataError: a worker ended in another way.
    """
    queue = deque(sorted(units, key=lambda unit: -unit.text_bytes))
    progress.started = time.monotonic()
    processes = min(workers, len(queue))
    with access_errors(unit_pass.out, KEPT):
        run = _Here(unit_pass, progress, show) if processes <= 1 else _Pool(unit_pass, processes, progress, show)
        with run:
            held = run.drain(queue)
            since = time.monotonic()
            while held and (patient or time.monotonic() - since < _HELD_SECONDS):
                time.sleep(_RETRY_SECONDS)
                held = run.drain(deque(held))
    return len(held)


def attempt(unit_pass: UnitPass, work: Callable[[Unit, Report], None], unit: Unit, report: Report) -> bool:
    """Work on a unit unless another process does; whether it is done now."""
    with locked(lock_path(unit_pass.out, unit.name)) as state, access_errors(unit_pass.out, KEPT):
        if state is Lock.BUSY:
            return False
        if unit_pass.is_done(unit):
            return True
        if state is Lock.TAKEN:
            remove_leftovers(unit_pass.out, unit.name)
        try:
            work(unit, report)
        except BaseException as error:
            if state is Lock.TAKEN:
                remove_leftovers(unit_pass.out, unit.name)
            if isinstance(error, MemoryError):
                raise MemoryLimitError(
                    f"There is not enough memory for unit {unit.name} ({error or 'none was given'}). {KEPT} Run the "
                    f"same command again with fewer --workers or more memory."
                ) from error
            raise
        return True


class _Here:
    """All in this process."""

    def __init__(self, unit_pass: UnitPass, progress: Progress, show: Show) -> None:
        self._pass, self._progress, self._show = unit_pass, progress, show
        self._work: Callable[[Unit, Report], None] | None = None

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def drain(self, queue: deque[Unit]) -> list[Unit]:
        """Work on all units that can be claimed; the others."""
        held = []
        if queue and self._work is None:
            self._work = self._pass.open()
        for unit in queue:
            if self._attempt(unit):
                self._progress.finished(unit)
            else:
                held.append(unit)
            self._show(self._progress)
        return held

    def _attempt(self, unit: Unit) -> bool:
        assert self._work is not None

        def report(text_bytes: int, tokens: int) -> None:
            self._progress.passed(unit, text_bytes, tokens)
            self._show(self._progress)

        try:
            return attempt(self._pass, self._work, unit, report)
        finally:
            free_memory()


# ---------------------------------------------------------------------------------------------------------------------
# The parent of worker processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    unit: Unit


class _Pool:
    """Gives units to worker processes, and reads what they say: ("passed", bytes, tokens), ("done", memory),
    ("held", memory) or ("error", exception)."""

    def __init__(self, unit_pass: UnitPass, processes: int, progress: Progress, show: Show) -> None:
        self._pass, self._processes, self._progress, self._show = unit_pass, processes, progress, show
        self._context = worker_context()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers + self._idle:
            worker.process.terminate()
        for worker in self._workers + self._idle:
            worker.process.join()
            worker.connection.close()
        for worker in self._workers:  # stopped in the middle of their units
            with locked(lock_path(self._pass.out, worker.unit.name)) as state:
                if state is Lock.TAKEN:
                    remove_leftovers(self._pass.out, worker.unit.name)

    def drain(self, queue: deque[Unit]) -> list[Unit]:
        """Work on all units that can be claimed; the others."""
        held: list[Unit] = []
        while queue or self._workers:
            while queue and len(self._workers) < self._processes:
                self._give(queue.popleft())
            watched: list[Any] = [worker.connection for worker in self._workers]
            ready = wait(watched, timeout=0.5)
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                self._hear(worker, held)
            self._show(self._progress)
        return held

    def _give(self, unit: Unit) -> None:
        if self._idle:
            worker = self._idle.pop()
            worker.unit = unit
        else:
            worker = _Worker(*self._start(), unit)
        self._workers.append(worker)
        self._progress.passed(unit, 0, 0)
        try:
            worker.connection.send(unit)
        except BrokenPipeError:
            self._lost(worker)

    def _start(self) -> tuple[BaseProcess, Connection]:
        """A new worker and our end of its pipe. A server that was killed counts as running while it ends, and answers
        nobody."""
        ends = time.monotonic() + _END_SECONDS
        while True:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(self._pass, theirs), daemon=True)
            try:
                with safe_path():  # Another server may take the place of one that was killed.
                    process.start()
                return process, ours
            except (ConnectionError, EOFError):
                ours.close()
                if time.monotonic() > ends:
                    raise
                time.sleep(_RETRY_SECONDS)
            finally:
                theirs.close()  # so that the end of the process is the end of the pipe

    def _hear(self, worker: _Worker, held: list[Unit]) -> None:
        try:
            kind, *values = worker.connection.recv()
        except (EOFError, OSError):  # the latter of a message that the end of the process tore
            self._lost(worker)
        if kind == "passed":
            self._progress.passed(worker.unit, *values)
            return
        self._workers.remove(worker)
        if kind == "error":
            self._idle.append(worker)
            self._progress.running.pop(worker.unit.name, None)
            self._progress.failed += 1
            self._show(self._progress)
            raise values[0]
        if kind == "done":
            self._progress.finished(worker.unit)
        else:
            self._progress.running.pop(worker.unit.name, None)
            held.append(worker.unit)
        if values[0] <= RECYCLE_BYTES:
            self._idle.append(worker)
        else:
            worker.connection.close()  # it ends when it finds nobody at the other side
            worker.process.join()

    def _lost(self, worker: _Worker) -> None:
        worker.process.join(_END_SECONDS)
        worker.process.terminate()  # nothing if it has ended, as it should have
        worker.process.join()
        code = worker.process.exitcode
        unit = f"while it worked on unit {worker.unit.name}"
        if code in (-signal.SIGKILL, _UNKNOWN_CODE):
            raise MemoryLimitError(
                f"A worker process of the build was killed {unit}, most likely for lack of memory. {KEPT} Run the same "
                f"command again with fewer --workers or more memory."
            )
        raise DataError(
            f"A worker process of the build ended with exit code {code} {unit}; what it said stands above. {KEPT} Run "
            f"the same command again."
        )


# ---------------------------------------------------------------------------------------------------------------------
# A worker process
# ---------------------------------------------------------------------------------------------------------------------


def _work(unit_pass: UnitPass, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return_large_blocks()
    began_with = resident_bytes()
    try:
        work = unit_pass.open()
        free_memory()
        while True:
            try:
                unit = connection.recv()
            except EOFError:
                return
            report = _Reporter(connection)
            done = attempt(unit_pass, work, unit, report)
            report.flush()
            free_memory()
            connection.send(("done" if done else "held", resident_bytes() - began_with))
    except UserError as error:
        connection.send(("error", error))
    except BaseException:
        connection.send(("error", RuntimeError(f"In a worker process:\n{traceback.format_exc()}")))


class _Reporter:
    """Sends what it is told to the parent, a few times a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._latest: tuple[int, int] | None = None
        self._sent = time.monotonic()

    def __call__(self, text_bytes: int, tokens: int) -> None:
        self._latest = text_bytes, tokens
        if time.monotonic() - self._sent >= _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the latest now."""
        if self._latest is not None:
            self._connection.send(("passed", *self._latest))
            self._latest, self._sent = None, time.monotonic()


def _end_with_parent() -> None:
    """Without this a worker would finish its unit, or wait for work for ever, after `kill -9` of the build."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
