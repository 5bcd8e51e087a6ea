"""The code of a job as it was when it was submitted: a requeue days later must not meet another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import launch
from rxt_dist.files import fsync_dir, write_json_atomic
from rxt_dist.train.run_dir import FROZEN, code_version

PACKAGES = ("rxt_dist", "data_prep", "launch")


def freeze_code(folder: Path) -> Path:
    """Copy the packages into `folder/code-DIGEST`, named by their content; what is there already is kept.

    Returns:
        the folder to import from.
    """
    root = Path(launch.__file__).resolve().parents[1]
    contents = {file: (root / file).read_bytes() for file in _files(root)}
    digest = hashlib.sha256()
    for file, content in contents.items():
        digest.update(f"{file}\0".encode() + hashlib.sha256(content).digest())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        for file, content in contents.items():
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).write_bytes(content)
        write_json_atomic(temporary / FROZEN, code_version())
        os.rename(temporary, target)
        fsync_dir(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # another launch may have been faster
            raise
    return target


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                yield path.relative_to(root)
