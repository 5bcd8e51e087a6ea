"""The run directory: everything that a run is, in one folder.

    config.resolved.yaml    the whole configuration, headed by the hash of what training depends on
    environment.json        where the present life of the run executes, with which versions and which code
    life.json               which life that is: a process that is of another one commits nothing
    finished.json           the step up to which the run is trained and evaluated; not there before the end
    metrics.jsonl           one line per log step; the truth
    events.jsonl            starts, resumes, skips, saves, stops, exits
    jumps.json              rows that are passed over since training went astray on them
    jumps-until-TIME.json   the same before some were taken back (`--from`)
    logs/                   one file per rank, launcher.log, and the stacks of ranks that hung
    profile/                traces and tables of `--profile`
    checkpoints/            see rxt_dist/checkpoint/store.py
    wandb/                  the copy for Weights & Biases
    STOP                    create it to stop the run at its next step

A run is opened by the same name again and again; it continues only with the training configuration it began with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import rxt_dist
from rxt_dist.config.load import RESUMABLE
from rxt_dist.errors import CheckpointError, ConfigError, SupersededError
from rxt_dist.files import write_atomic, write_json_atomic
from rxt_dist.finished import FINISHED, finished_step
from rxt_dist.lives import Life
from rxt_dist.locks import Lock, locked
from rxt_dist.train.events import EventLog, iso_time, now, parse_line, read_lines

# Beside a copy of the packages: the version of the code that was copied.
FROZEN = "frozen.json"
_HEADER = re.compile(r"# rxt-dist run, training hash (\S+)")
_DIFFERENCES_SHOWN = 5
_GIT_SECONDS = 10


class RunDirectory:
    """Names of the files of one run, and the order in which a life takes possession of it: `check`, `locked`, `begin`.

    Rank 0 does it for all. Before `begin` nothing is written that stays, so that a launch which is refused by then
    leaves no trace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.resolved.yaml"
        self.environment = path / "environment.json"
        self.life = path / "life.json"
        self.finished = path / FINISHED
        self.metrics = path / "metrics.jsonl"
        self.events = EventLog(path / "events.jsonl")
        self.jumps = path / "jumps.json"
        self.logs = path / "logs"
        self.profile = path / "profile"
        self.checkpoints = path / "checkpoints"
        self.stop_file = path / "STOP"
        self.lock_file = path / ".lock"
        self.changes: list[str] = []
        self.has_locks = True
        # Of this process, once it has begun.
        self._life: str | None = None
        self._training_hash: str | None = None

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        """Hold the run for this process; rank 0 does, for all.

        Where the file system knows no locks the run goes on, which is said: to refuse would be to train nowhere on that
        disk, and a second launch is a mistake that few make.

        Raises:
            ConfigError: another process trains it. Two of them would delete each other's checkpoints.
            OSError: whatever else the system says; a crash, after which a launcher starts again.
        """
        made = [path for path in (self.lock_file, self.path) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.lock_file) as lock:
            if lock is Lock.BUSY:
                raise ConfigError(
                    f"{self.path} is being trained by another process. Wait until it has ended, stop it (create "
                    f"{self.stop_file}), or give this run another name (name=...)."
                )
            if lock is Lock.UNSUPPORTED:
                self.has_locks = False
                print(
                    f"warning: the file system of {self.path} knows no locks (Lustre mounted without `flock`, NFS "
                    f"without its lock service), so that nothing keeps a second launch out of this run. Two would "
                    f"delete each other's checkpoints: start it once at a time, or put the run on another disk.",
                    file=sys.stderr,
                    flush=True,
                )
            try:
                yield lock
            finally:
                if self._life is None:
                    _remove(made)

    def log_file(self, rank: int) -> Path:
        """Where a rank other than the first writes what it prints, and each the traceback that ended it."""
        return self.logs / f"rank-{rank:05d}.log"

    def check(self, resolved_yaml: str, training_hash: str) -> None:
        """Refuse a directory that belongs to another run; nothing is written.

        Args:
            resolved_yaml: the complete configuration.
            training_hash: hash of the part of it on which the sequence of losses depends.

        Raises:
            ConfigError: the directory holds a run with another training hash; names the keys that differ. Or something
                else stands in the place of its files or folders.
        """
        self._require_kinds()
        if not self.config.exists():
            return
        old = self.config.read_text(encoding="utf-8", errors="replace")
        _require_same_training(self, old, resolved_yaml, training_hash)
        self.changes = _differences(old, resolved_yaml, every=True)

    def _require_kinds(self) -> None:
        """Refuse a pipe or a device for a file, whose reader would wait for ever, and for a folder whatever is none: a
        link to a disk that is not mounted would be taken for a run that has no checkpoints yet."""
        for path in (self.config, self.life, self.finished, self.metrics, self.events.path, self.jumps):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ConfigError(f"{path} is a pipe or a device, but must be a file of this run. Remove it.")
        for folder in (self.logs, self.checkpoints):
            if os.path.lexists(folder) and not folder.is_dir():
                what = "a link to nothing" if folder.is_symlink() else "a file"
                raise ConfigError(f"{folder} is {what}, but must be a folder of this run. Is its disk mounted?")

    def require_nothing_saved(self, aside: Sequence[Path]) -> None:
        """Refuse to begin from nothing where a checkpoint was committed that is neither there nor set aside: an empty
        folder may be the place of a disk that is not mounted.

        Args:
            aside: folders with checkpoints that were set aside.

        Raises:
            CheckpointError: naming the step.
        """
        named = {"save": "step", "resume": "step", "rollback": "to_step"}
        told = [event.get(named[event["kind"]]) for event in self.events.read() if event["kind"] in named]
        step = told[-1] if told else finished_step(self.path)
        if not isinstance(step, int) or step < 1 or any((folder / f"step-{step:08d}").is_dir() for folder in aside):
            return
        raise CheckpointError(
            f"{self.checkpoints} holds no checkpoint, but {self.path} tells of one at step {step}, and this run will "
            f"not begin again over its own history. Is its disk mounted? Bring the checkpoints back; to begin anew "
            f"remove {self.path}, or give the run another name."
        )

    def begin(self, resolved_yaml: str, training_hash: str, life: Life, ranks: int) -> None:
        """Write what this life is, when nothing but damaged checkpoints can refuse it any more; the lock is held.

        The run is not finished then, whatever an earlier life that went further has said. The configuration is written
        again where it is gone, once a checkpoint or the lack of any has shown that it is this run's.
        """
        self._life, self._training_hash = life.token, training_hash
        for folder in (self.path, self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, f"# rxt-dist run, training hash {training_hash}\n{resolved_yaml}")
        write_json_atomic(self.environment, environment())
        described = {
            "life": life.token,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": now(),
            "launched": iso_time(life.launched),
            "ranks": ranks,
        }
        write_json_atomic(self.life, described)
        self.finished.unlink(missing_ok=True)

    @property
    def is_superseded(self) -> bool:
        """Whether this process has begun a life of the run, and another one has begun since: on a machine that was cut
        off, while the run was started again elsewhere."""
        return self._life is not None and self.present_life() not in (None, self._life)

    def require_life(self) -> None:
        """Refuse to write into a run that is no longer this process's.

        Raises:
            SupersededError: it is in another life.
        """
        if self.is_superseded:
            raise SupersededError(
                f"{self.path} has been started again as life {self.present_life()} while this process, life "
                f"{self._life}, still ran (a machine that was cut off, or a disk without locks). This life ends, and "
                f"writes nothing more. See that only one of them runs."
            )

    def present_life(self) -> str | None:
        """The token of the life that began last, or None where none is known."""
        described = _read_json(self.life)
        return str(described["life"]) if "life" in described else None

    def record_finish(self, step: int, tokens: int) -> None:
        """Make it a fact that the run is trained and evaluated up to `step`."""
        fact = {"step": step, "tokens": tokens, "training_hash": self._training_hash}
        write_json_atomic(self.finished, fact)

    def finished_at(self, step: int) -> bool:
        """Whether an earlier life trained and evaluated everything up to `step`."""
        return finished_step(self.path) == step

    def last_step(self) -> int:
        """The last step that has a line; 0 before the first."""
        steps = [line["step"] for line in read_lines(self.metrics) if isinstance(line.get("step"), int)]
        return steps[-1] if steps else 0

    def record_origin(self, origin: Mapping[str, Any]) -> None:
        """Add to the environment of this life where the run's first weights came from."""
        known = json.loads(self.environment.read_text(encoding="utf-8"))
        write_json_atomic(self.environment, {**known, "origin": dict(origin)})


def environment() -> dict[str, Any]:
    """Machine, versions and code of this process. Imports nothing: torch is described only if it is already there."""
    torch = sys.modules.get("torch")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else None,
        "code": code_version(),
        "packages": _packages(),
    }


@cache
def _packages() -> dict[str, str]:
    """Versions of everything that is installed when this process first asks, by name.

    Of two of one name the first on the path is imported. Each description is parsed once, which `.name` does not.
    """
    versions: dict[str, str] = {}
    for described in (package.metadata for package in metadata.distributions()):
        if described["Name"]:
            versions.setdefault(described["Name"], described["Version"])
    return versions


def code_version() -> dict[str, Any]:
    """Version of this package, and its git commit where it runs from its own checkout (`modified`: with changes)."""
    code: dict[str, Any] = {"version": rxt_dist.__version__, "commit": None, "modified": None}
    checkout = Path(rxt_dist.__file__).resolve().parent.parent
    frozen = _read_json(checkout / FROZEN)
    if frozen:
        return frozen
    # A package installed below some other repository must not be taken for a part of it.
    if (checkout / ".git").exists():
        code["commit"] = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain")
        code["modified"] = None if changes is None else bool(changes)
    return code


def _git(checkout: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git is absent or refuses (another owner, no commit yet)."""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def require_checkpoint_of(run: Path, checkpoint: str, meta: Mapping[str, Any], training_hash: str) -> None:
    """Refuse a checkpoint that another training wrote, also where no configuration beside it says so.

    Args:
        checkpoint: its name. meta: its manifest's, with the hash of the configuration that wrote it.

    Raises:
        ConfigError: it was another one.
    """
    theirs = meta.get("training_hash")
    if theirs != training_hash:
        raise ConfigError(
            f"Checkpoint {checkpoint} of {run} was written with another training configuration (training hash "
            f"{str(theirs)[:12]}, this one has {training_hash[:12]}), and continuing it with this one would mix two "
            f"runs. Start it with the configuration that it began with, or give this run another name (name=...)."
        )


def _require_same_training(run: RunDirectory, old_text: str, resolved_yaml: str, training_hash: str) -> None:
    header = _HEADER.match(old_text)
    if header and header[1] == training_hash:
        return
    differences = _differences(old_text, resolved_yaml)
    shown = "; ".join(differences[:_DIFFERENCES_SHOWN]) or "no key, so the data or tokenizer behind a path has changed"
    more = len(differences) - _DIFFERENCES_SHOWN
    raise ConfigError(
        f"{run.path} holds a run with another training configuration, and continuing it with this one would mix two "
        f"runs. What differs: {shown}{f'; and {more} more' if more > 0 else ''}. To continue that run, restore its "
        f"values; to start another run, give it another name (name=...); to start over, remove {run.path}."
    )


def _remove(made: Sequence[Path]) -> None:
    """Take back what a launch that was refused has made; what another process has put there meanwhile stays."""
    for path in made:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is none that can be read."""
    try:
        return parse_line(path.read_bytes()) or {}
    except OSError:
        return {}


def _differences(old_yaml: str, new_yaml: str, *, every: bool = False) -> list[str]:
    """`key was A, is B` for every training key (or for every key) whose value differs."""
    try:
        old = dict(leaves(yaml.safe_load(old_yaml)))
    except (yaml.YAMLError, RecursionError):
        return ["config.resolved.yaml is no longer readable YAML"]
    new = dict(leaves(yaml.safe_load(new_yaml)))
    free = () if every else tuple(f"{free}." for free in RESUMABLE)
    keys = [key for key in {**new, **old} if not f"{key}.".startswith(free)]
    return [f"{key} was {_shown(old, key)}, is {_shown(new, key)}" for key in keys if old.get(key) != new.get(key)]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a mapping; lists are values."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{key}.{name}" if key else str(name))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
