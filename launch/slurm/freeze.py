"""The code of a job as it was when it was submitted: a requeue days later must not meet another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import launch
from rxt_dist.errors import ConfigError
from rxt_dist.files import fsync_dir, sha256_file, write_atomic, write_json_atomic
from rxt_dist.train.run_dir import FROZEN, code_version

PACKAGES = ("rxt_dist", "data_prep", "launch")
# In a copy: the hash of each of its files.
FILES = "files.json"
_ADVICE = "Submit the run again with the code of now: `rxt-dist launch slurm RUN.yaml`."


def freeze_code(folder: Path) -> Path:
    """Copy the packages into `folder/code-DIGEST`, named by their content; a whole copy that is there is kept.

    Returns:
        the folder to import from.
    """
    root = Path(launch.__file__).resolve().parents[1]
    contents = {file: (root / file).read_bytes() for file in _files(root)}
    digest = hashlib.sha256()
    for file, content in contents.items():
        digest.update(f"{file}\0".encode() + hashlib.sha256(content).digest())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        return _copied(contents, target)
    # A job may run from it, so what is whole stays as it is.
    for file in _damaged(target, contents):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target / file, contents[file])
    return target


def require_whole(code: Path) -> None:
    """Refuse a copy that has lost files since it was made, or has others than then.

    Raises:
        ConfigError: with the first of them.
    """
    try:
        hashes = json.loads((code / FILES).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{code}, the code of this run, is gone or damaged ({error}). {_ADVICE}") from error
    for file, expected in hashes.items():
        try:
            actual = sha256_file(code / file)
        except OSError:
            actual = None
        if actual != expected:
            what = "is gone" if actual is None else "has changed"
            raise ConfigError(f"{code} is no longer the code of this run: {file} {what}. {_ADVICE}")


def _copied(contents: Mapping[Path, bytes], target: Path) -> Path:
    folder = target.parent
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        for file, content in contents.items():
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).write_bytes(content)
        write_json_atomic(temporary / FROZEN, code_version())
        hashes = {str(file): hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        write_json_atomic(temporary / FILES, hashes)
        os.rename(temporary, target)
        fsync_dir(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # another launch may have been faster
            raise
    return target


def _damaged(target: Path, contents: Mapping[Path, bytes]) -> Iterator[Path]:
    for file, content in contents.items():
        try:
            whole = (target / file).read_bytes() == content
        except OSError:
            whole = False
        if not whole:
            yield file


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                yield path.relative_to(root)
