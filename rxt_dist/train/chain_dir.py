"""The folder of a chain, beside the run directories of its links; imports no torch.

chain.json         the links and where they are
links/NAME.yaml    the resolved run of a link, by which it is trained
links/NAME.json    a data job that is done: its arguments
pipeline.jsonl     when which link began and ended
STOP               create it to stop the link that runs, and the chain with it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rxt_dist.config.chain import Chain, DataJob, Link
from rxt_dist.config.load import resolved_yaml
from rxt_dist.errors import ConfigError
from rxt_dist.files import write_atomic, write_json_atomic
from rxt_dist.finished import is_finished
from rxt_dist.locks import Lock, held, locked
from rxt_dist.train.events import EventLog


class ChainDirectory:
    """Names of the files in a chain's folder."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.path = chain.directory
        self.described = self.path / "chain.json"
        self.links = self.path / "links"
        self.events = EventLog(self.path / "pipeline.jsonl")
        self.stop_file = self.path / "STOP"
        self.lock_file = self.path / ".lock"

    def run_file(self, link: str) -> Path:
        """The resolved run of a link."""
        return self.links / f"{link}.yaml"

    def require_free(self) -> None:
        """Refuse a chain that another process runs, and a folder that is a run's. Nothing is written.

        Raises:
            ConfigError: as said.
        """
        if (self.path / "config.resolved.yaml").exists():
            raise ConfigError(
                f"{self.path} holds a run, so it cannot be the folder of chain '{self.chain.name}': give the chain "
                f"another name (name=...)."
            )
        if held(self.lock_file):
            raise self._is_taken()

    def _is_taken(self) -> ConfigError:
        return ConfigError(
            f"{self.path}: another process runs this chain. Wait until it has ended, stop it (create "
            f"{self.stop_file}), or give this chain another output (output=...)."
        )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the chain for this process, its runs written out.

        Raises:
            ConfigError: another process holds it.
        """
        self.links.mkdir(parents=True, exist_ok=True)
        with locked(self.lock_file) as lock:
            if lock is Lock.BUSY:
                raise self._is_taken()
            for name, run in self.chain.runs.items():
                write_atomic(self.run_file(name), resolved_yaml(run))
            described = {
                "name": self.chain.name,
                "links": {
                    link.name: str(link.work.makes if isinstance(link.work, DataJob) else link.work.directory)
                    for link in self.chain.links
                },
            }
            write_json_atomic(self.described, described)
            yield

    def is_done(self, link: Link) -> bool:
        """Whether there is nothing left to do for a link."""
        return self.job_is_done(link.name) if isinstance(link.work, DataJob) else is_finished(link.work.directory)

    def job_is_done(self, link: str) -> bool:
        """Whether the data job of a link has ended well, and what it made is there or has served."""
        job = next(one.work for one in self.chain.links if one.name == link)
        assert isinstance(job, DataJob)
        return self._done(link) is not None and (job.makes.exists() or not self._is_awaited(link, job))

    def _is_awaited(self, link: str, job: DataJob) -> bool:
        """Whether a later link that is not finished reads what a job makes."""
        for later in self.chain.links[[one.name for one in self.chain.links].index(link) + 1 :]:
            if isinstance(later.work, DataJob):
                reads = any(Path(os.path.abspath(text)).is_relative_to(os.path.abspath(job.makes))
                            for text in later.work.arguments)  # fmt: skip
            else:
                reads = link in self.chain.awaited_jobs(later.name)
            if reads and not self.is_done(later):
                return True
        return False

    def check_job(self, link: str, job: DataJob) -> None:
        """Refuse a job that was done with other arguments, while what it made is there.

        Raises:
            ConfigError: with what to do.
        """
        done = self._done(link)
        if done is not None and done.get("arguments") != list(job.arguments) and job.makes.exists():
            raise ConfigError(
                f"it has made {job.makes} with other arguments: {' '.join(map(str, done.get('arguments', ())))}. "
                f"Restore them; or, to make the data again, remove {job.makes}."
            )

    def note_job(self, link: str, job: DataJob) -> None:
        """Make it a fact that a data job is done."""
        write_json_atomic(self._done_file(link), {"arguments": list(job.arguments), "makes": str(job.makes)})

    def _done_file(self, link: str) -> Path:
        return self.links / f"{link}.json"

    def _done(self, link: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._done_file(link).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
