"""A chain of runs, link after link on this machine: what is finished is passed over, the first that ends otherwise
ends the chain with its exit code, and the same command goes on there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launch.local import Launch, launch
from launch.watching import Patience, Received, signals_noted
from rxt_dist.config.chain import Chain, DataJob, Link
from rxt_dist.config.duration import seconds_of
from rxt_dist.config.run import RunConfig
from rxt_dist.errors import ExitCode, UserError, error_class
from rxt_dist.files import access_errors
from rxt_dist.lives import file_identity
from rxt_dist.train.chain_dir import ChainDirectory

DATA_COMMAND = (sys.executable, "-m", "rxt_dist", "data")
_POLL_SECONDS = 0.2
# A data job that is to end is killed after so long; what it has committed stays.
_JOB_SECONDS = 10.0
_CHECK_SECONDS = 1800


@dataclass(frozen=True)
class Options:
    """ranks: of every run; None: as many as its cluster has on a node. resume_attempts: of every link, as `launch
    local` has them. time_limit: of the whole chain (3h50m)."""

    ranks: int | None = None
    resume_attempts: int = 0
    time_limit: str | None = None


def check(file: Path, overrides: Sequence[str], ranks: int | None) -> None:
    """Ask a process of its own, which loads torch, for whatever would refuse a link of the chain.

    Raises:
        UserError: as that says.
    """
    command = [sys.executable, "-m", "rxt_dist.train.chain_check", str(file), str(ranks or 0), *overrides]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=_CHECK_SECONDS, check=False)
    if done.returncode:
        raise _as_error(done.returncode, refusal_of(done.stderr))


def refusal_of(stderr: str) -> str:
    """What the check says behind its `error: `, which begins a line; before it warnings may stand. Else the end of
    all."""
    found = re.search(r"^error: (.*)", stderr, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else stderr[-2000:]


def _as_error(code: int, text: str) -> UserError:
    for name in ("ConfigError", "DataError", "DiskError", "MemoryLimitError"):
        kind = error_class(name)
        if kind is not None and kind.exit_code == code:
            return kind(text)
    raise RuntimeError(f"the check of the chain ended with exit code {code}:\n{text}")


class Pipeline:
    """A chain that was checked, and how it is run.

    Args:
        old_stop: identity of the chain's STOP file that was there when the command began; None: look now. A newer one
            was made while the chain was checked, and is meant for this command.
    """

    def __init__(
        self,
        chain: Chain,
        options: Options,
        start: Callable[[Launch, Received], int] = launch,
        old_stop: str | None = None,
    ) -> None:
        self.chain, self.options, self._start = chain, options, start
        self.folder = ChainDirectory(chain)
        self._old_stop = file_identity(self.folder.stop_file) if old_stop is None else old_stop
        self.received = Received()
        self._stop_is_asked = False
        self._running: RunConfig | None = None
        self._end = time.time() + seconds_of(options.time_limit) if options.time_limit else None

    def run(self) -> int:
        """Run what is not finished.

        Returns:
            the exit code of the link that ended the chain; 0: all are finished.

        Raises:
            ConfigError: another process runs the chain.
        """
        self.folder.require_free()
        with access_errors(self.chain.directory), self.folder.taken(), signals_noted() as self.received:
            if self._old_stop and file_identity(self.folder.stop_file) == self._old_stop:
                self.folder.stop_file.unlink(missing_ok=True)
            self._stop_is_asked = file_identity(self.folder.stop_file) != ""
            with self._watching():
                for number, link in enumerate(self.chain.links, 1):
                    code = self._link(number, link)
                    if code:
                        return code
        _say(f"chain '{self.chain.name}' is finished: {self.chain.directory}")
        return ExitCode.DONE

    def _link(self, number: int, link: Link) -> int:
        what = f"link {number} of {len(self.chain.links)}, '{link.name}'"
        if self.folder.is_done(link):
            _say(f"{what}: is finished")
            return 0
        ended = self._ended()
        if ended is None:
            _say(f"{what}: begins")
            self.folder.events.append("begin", link=link.name)
            ended = self._job(link.name, link.work) if isinstance(link.work, DataJob) else self._train(link)
            self.folder.events.append("end", link=link.name, code=ended)
        if ended:
            _say(f"{what}: ended with exit code {ended}; the same command goes on from here")
        return ended

    def _ended(self) -> int | None:
        """The exit code of a chain that is to end before its next link; None: it goes on."""
        if self.received.at_once is not None:
            return 128 + self.received.at_once
        if self._stop_is_asked:
            return int(ExitCode.STOPPED)
        if self.received.stop is not None or (self._end is not None and time.time() >= self._end):
            return int(ExitCode.PREEMPTED)
        return None

    def _train(self, link: Link) -> int:
        run = self.chain.runs[link.name]
        command = [sys.executable, "-m", "rxt_dist", "train", str(self.folder.run_file(link.name))]
        limits: list[float] = [seconds_of(run.train.time_limit)] if run.train.time_limit else []
        if self._end is not None:
            limits.append(max(1.0, self._end - time.time()))
            command.append(f"train.time_limit={self.options.time_limit}")
        wanted = Launch(
            command,
            self.options.ranks or run.cluster.gpus_per_node,
            self.options.resume_attempts,
            run.directory,
            min(limits, default=None),
            patience=Patience.of(run.health.deadlines),
        )
        self._running = run
        try:
            return self._start(wanted, self.received)
        finally:
            self._running = None

    def _job(self, name: str, job: DataJob) -> int:
        """A data job, in a process of its own; it is safe to end it at any moment."""
        process = subprocess.Popen([*DATA_COMMAND, *job.arguments], start_new_session=True)
        try:
            while process.poll() is None and self._ended() is None:
                time.sleep(_POLL_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_JOB_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended = self._ended()
        if ended is not None and process.returncode:
            return ended
        if process.returncode == 0 and not job.makes.exists():
            _say(f"error: link '{name}' ended well, but {job.makes} is not there: name in `makes` what it makes.")
            return int(ExitCode.CONFIG)
        if process.returncode == 0:
            self.folder.note_job(name, job)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    # -- STOP ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Pass the chain's STOP file on to the run of the moment, while the block lasts."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(_POLL_SECONDS):
            self._stop_is_asked = self._stop_is_asked or file_identity(self.folder.stop_file) != ""
            run = self._running
            if self._stop_is_asked and run is not None and run.directory.is_dir():
                # A life that begins removes an older one, so that it is made again until the run has ended.
                with suppress(OSError):
                    (run.directory / "STOP").touch(exist_ok=False)


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
