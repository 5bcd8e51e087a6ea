"""What the system refuses, as an error that says what could not be read or written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rxt_dist import files
from rxt_dist.errors import DataError


@contextmanager
def dataset_errors(folder: Path) -> Iterator[None]:
    """For work on the files of `folder`.

    Raises:
        DiskError: its disk is full, or fails.
        ConfigError: something cannot be read or written.
        DataError: instead of any other error of the system.
    """
    try:
        with files.access_errors(folder, "What is finished is kept."):
            yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error}). What is finished is "
            f"kept: mend the rights, or what is wrong with the disk, and run the same command again."
        ) from error
