"""What a launch leaves in a run directory, for its job and for whoever asks about it:

    job/code-DIGEST/        the code as it was when it was submitted
    job/0001/               one submission: run.yaml (resolved), submit.sbatch, launch.json, the job's output
    job/ledger.jsonl        what happened in all jobs of the run (ledger.py)
    job/status.json         what its job does now
    job/lives/TOKEN/        of one life: nodes checked, how each rank ended, what it said, the file that asks for a stop

The supervisor reads all this with the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rxt_dist.errors import ConfigError
from rxt_dist.files import write_json_atomic

_NUMBER = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class Description:
    """One submission, as its job needs it.

    submission: its number. run: the run directory. command: what a rank executes, without the python. once: further
    arguments in the first life. python: the interpreter on the nodes. node_counts: numbers of nodes that the run can
    work on, largest first. lead: seconds from the user signal to the end of the job's time. prefix: a container's
    command before the python of ranks. srun: further arguments of srun for ranks. chain: jobs of a submission, one
    after the other. code: the frozen code. old_stop: identity of the STOP file that was there at submission. jobs: ids,
    in order of submission. after: run directories that have to be finished before the first life.
    """

    submission: int
    run: str
    name: str
    command: list[str]
    once: list[str]
    python: str
    node_counts: list[int]
    ranks_per_node: int
    cpus_per_task: int
    signal: str
    lead: int
    launcher: str
    requeue: bool
    preflight: bool
    prefix: list[str]
    srun: list[str]
    exclude: str | None
    chain: int
    code: str
    old_stop: str
    jobs: list[str]
    after: list[str]

    @property
    def folder(self) -> JobFolder:
        """Where it stands."""
        return JobFolder(Path(self.run))

    @property
    def contained(self) -> bool:
        """Whether ranks run in an image."""
        return bool(self.prefix) or any(argument.startswith("--container-image=") for argument in self.srun)

    @property
    def file(self) -> Path:
        """The file that `write` writes."""
        return self.folder.submission(self.submission) / "launch.json"

    def write(self) -> None:
        """Keep it, where `read` finds it."""
        write_json_atomic(self.file, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Description:
        """What stands in a launch.json.

        Raises:
            ConfigError: nothing that can be read, or what another version wrote.
        """
        try:
            values: Any = json.loads(path.read_bytes())
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} does not describe a job ({error}). Submit the run again: `rxt-dist launch slurm RUN.yaml`."
            ) from error


class JobFolder:
    """Names of the files of the jobs of one run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "job"
        self.ledger = self.path / "ledger.jsonl"
        self.status = self.path / "status.json"

    def submission(self, number: int) -> Path:
        return self.path / f"{number:04d}"

    def life(self, token: str) -> Path:
        return self.path / "lives" / token

    @property
    def newest(self) -> int:
        """Number of the newest submission; 0: there is none."""
        try:
            names = [entry.name for entry in self.path.iterdir()]
        except OSError:
            return 0
        whole = [int(name) for name in names if _NUMBER.fullmatch(name) and (self.path / name / "launch.json").exists()]
        return max(whole, default=0)

    def description(self) -> Description | None:
        """The newest submission, if the run was ever submitted from where it is: of a copy the jobs are another's."""
        number = self.newest
        found = Description.read(self.submission(number) / "launch.json") if number else None
        return found if found is not None and self._is_own(found) else None

    def _is_own(self, description: Description) -> bool:
        try:
            return os.path.samefile(description.run, self.run)
        except OSError:
            return False
