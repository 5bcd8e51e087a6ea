"""Errors that a person can act on, each with the exit code that a scheduler can act on.

A `UserError` carries one paragraph: what is wrong, the value that is wrong, and what to do. The command line prints it
without a traceback and exits with `exit_code`. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, the protocol between a training job and whatever started it."""

    DONE = 0
    CRASH = 1
    CONFIG = 64
    DATA = 65
    UNAVAILABLE = 69
    MEMORY = 71
    DISK = 74
    PREEMPTED = 75
    STOPPED = 76
    DIVERGED = 86
    HANG = 87
    CRASH_LOOP = 93


# Starting again cannot mend these: the same configuration, data, memory or divergence would meet the next life, and
# whoever made the STOP file wants no other.
_FINAL = frozenset(
    {
        ExitCode.DONE,
        ExitCode.CONFIG,
        ExitCode.DATA,
        ExitCode.MEMORY,
        ExitCode.DISK,
        ExitCode.STOPPED,
        ExitCode.DIVERGED,
        ExitCode.CRASH_LOOP,
    }
)


def may_start_again(code: int) -> bool:
    """Whether a training that ended with this exit code may be started again as it is: after a stop and a crash."""
    return code not in _FINAL


class UserError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code: ExitCode = ExitCode.CONFIG
    # Whether all ranks end with this very error, so that one of them says it.
    common = False


class ConfigError(UserError):
    """A configuration, command line or topology that cannot work."""

    exit_code = ExitCode.CONFIG


class DataError(UserError):
    """Text, shards, a tokenizer or a manifest that cannot be used as they are."""

    exit_code = ExitCode.DATA


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or not this run's."""

    exit_code = ExitCode.DATA


class SupersededError(UserError):
    """The run has been started again elsewhere: this process may not write into it any more."""

    exit_code = ExitCode.DATA


class MemoryLimitError(UserError):
    """Work that needs more memory than there is: with as much again it would end in the same way."""

    exit_code = ExitCode.MEMORY


class UnavailableError(UserError):
    """Another rank, or the port by which ranks find each other, is out of reach: another start may do."""

    exit_code = ExitCode.UNAVAILABLE


class DiskError(UserError):
    """Not enough disk space for what was asked, or a disk that fails."""

    exit_code = ExitCode.DISK


class DivergedError(UserError):
    """Losses or gradients went astray too often, also from where the run went back to."""

    exit_code = ExitCode.DIVERGED


class ReplicaError(UserError):
    """Ranks that must hold the same weights do not: another start loads the same ones for all."""

    exit_code = ExitCode.CRASH


def error_class(name: str) -> type[UserError] | None:
    """The class of errors with this name, as one process tells another; None if it is no UserError."""
    kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]
    return next((kind for kind in kinds if kind.__name__ == name), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
