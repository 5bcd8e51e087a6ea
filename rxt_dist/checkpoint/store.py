"""The commit protocol of checkpoints: files in folders, without a process group and without an engine.

A checkpoint is a folder of files and a manifest that names each of them with its size and blake3:

    checkpoints/step-00000120.tmp/     being written; ignored by every load
    checkpoints/step-00000120/         committed: the rename into this name is the moment of the commit
    checkpoints/latest                 the name of the newest committed folder

The order is files -> fsync -> manifest -> fsync -> rename -> fsync -> `latest` -> prune, so that a kill between any two
operations leaves what was committed before untouched. Rank 0 calls `begin`, `commit` and the reading methods; every
rank calls `record` for the files that it wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.daemons import map_on_daemons
from rxt_dist.checkpoint.retention import Retention
from rxt_dist.errors import CheckpointError, SupersededError
from rxt_dist.files import (
    blake3_file,
    fsync_dir,
    patiently,
    require_free_space,
    sha256_file,
    write_atomic,
    write_json_atomic,
)
from rxt_dist.finished import COMMITTED

_LOGGER = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
# Where in a manifest's meta the checksum of the state is.
CHECKSUM = "state_checksum"
# Manifests of format 1 have the sha256 of their files; they and those of format 2 have another checksum of the state,
# which overlooked damage in patterns and is not looked at.
_FORMAT, _OLDER_FORMATS = 3, (2, 1)
_UNFINISHED = re.compile(r"step-(\d{8,})\.tmp")
# blake3 releases the interpreter lock; more threads than this only queue up at one disk.
_HASH_THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its path inside the folder (with `/`), its size in bytes and its hex blake3.

    sha256: that instead, of manifests of format 1 and exports of their time: it takes three times as long.
    """

    name: str
    bytes: int
    blake3: str = ""
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {name: value for name, value in asdict(self).items() if value != ""}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint as its manifest describes it; `digest` is the manifest's own."""

    step: int
    path: Path
    meta: dict[str, Any]
    files: tuple[FileRecord, ...]
    digest: str

    @property
    def is_suspect(self) -> bool:
        """Whether it was made while losses said that something was wrong."""
        return bool(self.meta.get("suspect"))


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of a listing.

    `bytes` is what the folder occupies, `meta` holds the plain top-level values (numbers, texts) of the manifest's
    meta, `problem` says why a folder with a final name is not readable; contents are not hashed for a listing.
    """

    step: int
    path: Path
    committed: bool
    bytes: int
    meta: dict[str, Any]
    problem: str | None


class _ManifestError(Exception):
    """A manifest that cannot be believed; the text says why."""


# Named here because inside the store `list` is the method.
_Listing = list[CheckpointInfo]
_Problems = list[str]
_Folders = list[tuple[int, Path]]
_Fingerprint = tuple[tuple[str, int, int], ...]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: the `checkpoints` folder of the run; created by the first `begin`, if that of the run is there.
        keep: newest valid checkpoints that pruning leaves, see `Retention`.
        guard: called before anything is committed, moved or removed; raises `SupersededError` if the run is not this
            process's any more.
        milestone_tokens, keep_best: what else stays, see `Retention`.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        guard: Callable[[], None] = lambda: None,
        *,
        milestone_tokens: int = 0,
        keep_best: bool = False,
    ) -> None:
        self.directory = directory
        self.retention = Retention(keep, milestone_tokens, keep_best)
        self._guard = guard
        # Checkpoints whose contents this process has written, read or hashed, and what it found; with the state of
        # their files at that moment.
        self._known: dict[int, tuple[bool, _Fingerprint]] = {}

    def folder(self, step: int) -> Path:
        """Where the committed checkpoint of `step` is, or would be."""
        return self.directory / f"step-{step:08d}"

    def unfinished_folder(self, step: int) -> Path:
        """Where the files of `step` are written before the commit; the same on every rank."""
        return self.directory / f"step-{step:08d}.tmp"

    def require_space(self, needed_bytes: int) -> None:
        """Raise `DiskError` when the disk cannot hold another checkpoint of `needed_bytes`.

        Call it after `begin`, which frees what an interrupted save left behind.
        """
        require_free_space(self.directory, needed_bytes, "A checkpoint")

    def begin(self, step: int) -> Path:
        """Create the empty folder for the files of `step`, removing what interrupted saves left; rank 0, first."""
        self._guard()
        for _, leftover in self._folders(_UNFINISHED):
            # A network file system keeps what another process still has open, under dotted names.
            shutil.rmtree(leftover, ignore_errors=True)
        # Not the folders above: a run that was moved away must not begin anew where it was.
        self.directory.mkdir(exist_ok=True)
        folder = self.unfinished_folder(step)
        folder.mkdir(exist_ok=True)
        if left := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise CheckpointError(f"{folder} cannot be cleared of what an interrupted save left: {', '.join(left)}.")
        return folder

    def discard(self, step: int) -> None:
        """Free what a failed save of `step` has written, as far as the system lets us; rank 0.

        Another rank that is still writing meets a missing folder, or a file that vanishes when it is closed.
        """
        with suppress(SupersededError):  # Then it is another life's.
            self._guard()
            shutil.rmtree(self.unfinished_folder(step), ignore_errors=True)

    def record(self, path: Path, blake3: str | None = None) -> FileRecord:
        """Make a written file durable and describe it; called by the rank that wrote it.

        Args:
            blake3: of what was written; without it the file is read once.
        """
        folder = self.directory / path.relative_to(self.directory).parts[0]
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        return FileRecord(path.relative_to(folder).as_posix(), size, blake3 or blake3_file(path))

    def commit(self, step: int, files: Sequence[FileRecord], meta: Mapping[str, Any]) -> Path:
        """Turn the written files of `step` into a checkpoint; rank 0, after every rank has recorded its files.

        Args:
            files: the records of all ranks together.
            meta: JSON values that a load needs (tokens, data position, hashes, topology, versions); no NaN.

        Raises:
            CheckpointError: a recorded file is absent or has another size, or a written file was not recorded.
                Nothing has been committed or pruned then.
        """
        unfinished, final = self.unfinished_folder(step), self.folder(step)
        _require_complete(unfinished, files)
        for folder in {(unfinished / file.name).parent for file in files}:
            fsync_dir(folder)
        write_json_atomic(unfinished / MANIFEST, _manifest(step, files, meta))
        self._guard()
        if final.exists() and self.verify(step):
            # Damaged, so no load would have taken it.
            shutil.rmtree(final)
        if final.exists():
            shutil.rmtree(unfinished)
        else:
            os.rename(unfinished, final)
            fsync_dir(self.directory)
        with suppress(OSError):  # Only a hint: what is committed is committed.
            write_atomic(self.directory / LATEST, final.name + "\n")
        self.note(step, sound=True)
        try:
            self.prune()
        except OSError as error:
            # What is committed is committed; the next save tries again.
            _LOGGER.warning("Old checkpoints in %s cannot be removed (%s).", self.directory, error)
        return final

    def has_manifest(self, step: int) -> bool:
        """Whether a committed checkpoint of `step` is there; its manifest is the first that pruning removes."""
        return (self.folder(step) / MANIFEST).exists()

    def list(self) -> _Listing:
        """Every checkpoint folder by ascending step, unfinished ones included; reads manifests, hashes nothing."""
        found = [_describe(step, path, committed=True) for step, path in self._folders(COMMITTED)]
        found += [_describe(step, path, committed=False) for step, path in self._folders(_UNFINISHED)]
        return sorted(found, key=lambda info: (info.step, info.committed))

    def read(self, step: int) -> Checkpoint:
        """The committed checkpoint of `step` as its manifest describes it; its files are not looked at.

        Raises:
            CheckpointError: the manifest is missing or damaged.
        """
        try:
            return _read_manifest(self.folder(step))
        except _ManifestError as error:
            raise CheckpointError(f"The manifest of {self.folder(step)} cannot be read: {error}.") from error

    def verify(self, checkpoint: int | Path, full: bool = True) -> _Problems:
        """Problems of one checkpoint, each naming its file; empty when it is sound.

        Args:
            checkpoint: a step of this store, or the path of a checkpoint folder.
            full: read and hash every file (about 3 GB/s and thread); otherwise compare names and sizes only.
        """
        folder = self.folder(checkpoint) if isinstance(checkpoint, int) else checkpoint
        return _examine(folder, full)[1]

    def latest_valid(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose every file has the recorded hash, or None where there is none.

        Args:
            report: called with one sentence for each newer checkpoint that was rejected, for a wrong `latest`, and if
                the one that is chosen was made while losses were suspect.
        """
        self.check_pointer(report)
        for step, folder in reversed(self._folders(COMMITTED)):
            checkpoint, problems = _examine(folder, full=True)
            self.note(step, sound=not problems)
            if checkpoint is not None and not problems:
                if checkpoint.is_suspect:
                    report(f"Checkpoint {folder} was made while losses were suspect.")
                return checkpoint
            report(f"Checkpoint {folder} is rejected: {'; '.join(problems)}.")
        return None

    def check_pointer(self, report: Callable[[str], None]) -> None:
        """Say so when `latest` names nothing that is there; folders count, not it."""
        pointer = self.directory / LATEST
        if not os.path.lexists(pointer):
            return
        try:
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            report(f"{pointer} cannot be read ({error.strerror}); looking at the folders instead.")
            return
        if not name or not (self.directory / name).is_dir():
            report(f"{pointer} names '{name}', which does not exist; looking at the folders instead.")

    def note(self, step: int, *, sound: bool) -> None:
        """Remember what the contents of a checkpoint were found to be; pruning does not read them again."""
        self._known[step] = sound, _fingerprint(self.folder(step))

    def set_aside(self, after: int, beside: Iterable[Path] = ()) -> Path:
        """Move every checkpoint later than `after`, and what is unfinished, into a folder that no load looks at.

        The newest goes first: whatever a kill leaves, the newest that is there is a state that this run was in.

        Args:
            beside: files of which a copy is put there, before anything is moved: who finds nothing to move any more
                would not think of them.

        Returns the folder, `set-aside-TIME`.
        """
        self._guard()
        aside = self.directory / datetime.now(UTC).strftime("set-aside-%Y%m%dT%H%M%S.%fZ")
        aside.mkdir()
        for file in beside:
            write_atomic(aside / file.name, file.read_bytes())
        for _, folder in self._folders(_UNFINISHED):
            os.rename(folder, aside / folder.name)
        for step, folder in reversed(self._folders(COMMITTED)):
            if step > after:
                os.rename(folder, aside / folder.name)
        fsync_dir(aside)
        fsync_dir(self.directory)
        with suppress(OSError):
            left = self.steps()
            if left:
                write_atomic(self.directory / LATEST, self.folder(left[-1]).name + "\n")
            else:
                (self.directory / LATEST).unlink(missing_ok=True)
        return aside

    def aside(self) -> Sequence[Path]:
        """Folders with what was set aside, oldest first."""
        return sorted(self.directory.glob("set-aside-*"))

    def steps(self) -> Sequence[int]:
        """Steps that have a committed checkpoint, in ascending order, by the names of folders: one look, and
        right while another process saves."""
        return [step for step, _ in self._folders(COMMITTED)]

    def _folders(self, pattern: re.Pattern[str]) -> _Folders:
        """(step, folder) of every folder whose name matches, by ascending step."""
        if not self.directory.is_dir():
            return []
        matches = ((pattern.fullmatch(path.name), path) for path in self.directory.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in matches if match)

    def reasons(self) -> Mapping[int, str]:
        """Why checkpoints stay at the next pruning, by step; see `Retention.choose`."""
        sound = {}
        for step, folder in self._folders(COMMITTED):
            checkpoint = self._if_sound(step, folder)
            if checkpoint is not None:
                sound[step] = checkpoint.meta
        return self.retention.choose(sound)

    def prune(self, *, remove: bool = True) -> Sequence[Path]:
        """Remove what no longer has to stay; damaged and suspect ones do not count, and go like the others. What the
        system does not let us read is not known to be damaged, and stays.

        Args:
            remove: False: only look.

        Returns:
            What was (or would be) removed.

        Raises:
            OSError: some could not be removed, the first of these errors; all others are gone.
        """
        reasons = self.reasons()
        newest = [step for step, reason in reasons.items() if reason == "newest"]
        if len(newest) < self.retention.keep:
            return []
        unnamed = [(step, folder) for step, folder in self._folders(COMMITTED) if step not in reasons]
        old = [(step, folder) for step, folder in unnamed if step < min(newest) and _is_readable(folder)]
        refused: list[OSError] = []
        for step, folder in old if remove else []:
            try:
                _remove(folder)
            except OSError as error:
                refused.append(error)
            self._known.pop(step, None)
        if refused:
            raise refused[0]
        return [folder for _, folder in old]

    def _if_sound(self, step: int, folder: Path) -> Checkpoint | None:
        """A checkpoint that is whole: by its contents if this process knows them, else by its manifest and the sizes of
        its files.

        To hash every kept checkpoint at the first save of a life would read several times what is written. The newest
        ones are known: a life has read what it was resumed from, and hashed those newer whose contents it rejected.
        """
        checkpoint, problems = _examine(folder, full=False)
        known = self._known.get(step)
        if problems or checkpoint is None or known is None:
            return None if problems else checkpoint
        sound, state = known
        if state != _fingerprint(folder):
            sound = not self.verify(step)
            self.note(step, sound=sound)
        return checkpoint if sound else None


def _remove(folder: Path) -> None:
    if folder.is_symlink():  # A person has moved it to another disk: what is there is theirs.
        folder.unlink()
        return
    # The manifest goes first: a kill in the middle leaves a folder that no load can mistake for whole.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _is_readable(folder: Path) -> bool:
    """Whether the system lets us see what is in a checkpoint's folder, be it whole or not."""
    try:
        for path in _files_below(folder):
            path.stat()
        if (folder / MANIFEST).exists():
            (folder / MANIFEST).read_bytes()
    except OSError:
        return False
    return True


def _fingerprint(folder: Path) -> _Fingerprint:
    """Name, size and time of change of every file, in nanoseconds: equal as long as nobody wrote to the files."""
    found = []
    for path in _files_below(folder):
        with suppress(FileNotFoundError):  # Of another run, which prunes.
            stat = path.stat()
            found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_complete(folder: Path, files: Sequence[FileRecord]) -> None:
    """Raise `CheckpointError` unless `files` are exactly the files in `folder`."""
    problems = [problem for file in files if (problem := _size_problem(folder, file))]
    names = {file.name for file in files}
    if len(names) < len(files):
        problems.append("two ranks recorded a file of the same name")
    # Network file systems keep deleted but open files under dotted names.
    written = {path.relative_to(folder).as_posix() for path in _files_below(folder) if not path.name.startswith(".")}
    problems += [f"{name}: written but not recorded by any rank" for name in sorted(written - names - {MANIFEST})]
    if problems or not files:
        raise CheckpointError(
            f"The checkpoint in {folder} is incomplete and was not committed: {'; '.join(problems) or 'no files'}. "
            f"Check that every rank writes to the same shared folder and that the disk is not full; "
            f"the checkpoints committed before are untouched."
        )


def _manifest(step: int, files: Iterable[FileRecord], meta: Mapping[str, Any]) -> dict[str, Any]:
    body = {
        "format": _FORMAT,
        "step": step,
        "meta": dict(meta),
        "files": [file.to_json() for file in sorted(files, key=lambda file: file.name)],
    }
    # A round trip through text, so that the digest is over what a reader will see (tuples as lists, keys as text).
    body = json.loads(json.dumps(body, allow_nan=False))
    return {**body, "digest": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    """sha256 over the manifest itself: a flipped digit in `meta` would otherwise resume at the wrong data position."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> Checkpoint:
    """Parse and check a manifest, without looking at the files that it names.

    Raises:
        _ManifestError: absent, empty, truncated, altered, of another format or another step.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise _ManifestError(error.strerror or str(error)) from error
    if not content.strip():
        raise _ManifestError("empty")
    try:
        body = json.loads(content)
        digest = body.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _ManifestError(f"truncated or not a manifest ({len(content)} bytes)") from error
    if body.get("format") not in (_FORMAT, *_OLDER_FORMATS):
        raise _ManifestError(f"format {body.get('format')}, but this version reads formats up to {_FORMAT}")
    if digest != _digest(body):
        raise _ManifestError("altered since it was written (its own sha256 differs)")
    named = COMMITTED.fullmatch(folder.name)
    if named and int(named[1]) != body["step"]:
        raise _ManifestError(f"describes step {body['step']}, not the step in the folder's name")
    return Checkpoint(body["step"], folder, body["meta"], tuple(FileRecord(**file) for file in body["files"]), digest)


def _examine(folder: Path, full: bool) -> tuple[Checkpoint | None, list[str]]:
    """A checkpoint folder and its problems; the checkpoint is None when its manifest cannot be believed."""
    if not folder.is_dir():
        return None, [f"{folder}: no such checkpoint"]
    try:
        checkpoint = _read_manifest(folder)
    except _ManifestError as error:
        return None, [f"{MANIFEST}: {error}"]
    if full:
        return checkpoint, content_problems(folder, checkpoint.files)
    problems = (_size_problem(folder, file) for file in checkpoint.files)
    return checkpoint, [problem for problem in problems if problem]


def content_problems(folder: Path, files: Sequence[FileRecord]) -> list[str]:
    """Read and hash files of a checkpoint; what is wrong with them, each by its name."""
    problems = map_on_daemons(lambda file: _content_problem(folder, file), files, _HASH_THREADS)
    return [problem for problem in problems if problem]


def _size_problem(folder: Path, file: FileRecord) -> str | None:
    path = folder / file.name
    try:
        if not path.is_file():
            return f"{file.name}: missing"
        size = path.stat().st_size
    except OSError as error:
        return f"{file.name}: cannot be looked at ({error.strerror})"
    return None if size == file.bytes else f"{file.name}: {size} bytes instead of {file.bytes}"


def _content_problem(folder: Path, file: FileRecord) -> str | None:
    """As `_size_problem`, and the content; a file that cannot be read is a problem too, not an error."""
    if problem := _size_problem(folder, file):
        return problem
    expected, hashed = (file.blake3, blake3_file) if file.blake3 else (file.sha256, sha256_file)
    try:
        actual = patiently(lambda: hashed(folder / file.name))
    except OSError as error:
        return f"{file.name}: cannot be read ({error.strerror})"
    if actual == expected:
        return None
    return f"{file.name}: damaged (its hash is {actual[:12]} instead of {expected[:12]})"


def _describe(step: int, path: Path, committed: bool) -> CheckpointInfo:
    occupied = sum(size for _, size, _ in _fingerprint(path))
    meta: dict[str, Any] = {}
    problem = None
    if committed:
        checkpoint, problems = _examine(path, full=False)
        meta = checkpoint.meta if checkpoint else {}
        problem = "; ".join(problems) or None
    summary = {key: value for key, value in meta.items() if isinstance(value, str | int | float)}
    return CheckpointInfo(step, path, committed, occupied, summary, problem)
