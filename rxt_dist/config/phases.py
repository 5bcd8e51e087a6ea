"""How long the phases of a data mixture are: one rule for training, planning and looking, of which building warns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rxt_dist.config.run import DataConfig, PhaseConfig
from rxt_dist.errors import ConfigError

# Rows of a block of the global order, in which every source has its exact share.
BLOCK = 4096
# By how much the rounding to whole blocks may change the length that a phase was given.
_ROUNDING = 0.01


def phase_paths(data: DataConfig) -> list[Path]:
    """The folder that each phase reads."""
    paths: list[Path] = []
    for phase in data.mixture:
        paths.append(phase.path or (paths[-1] if paths else data.path))
    return paths


def check_phases(phases: Sequence[PhaseConfig], total_tokens: int | None, seq_len: int | None) -> None:
    """Refuse what `phase_lengths` refuses; without `seq_len`, which is the dataset's then, what does not hang on it.

    Raises:
        ConfigError: as `phase_lengths`.
    """
    if seq_len is None:
        _require_cover(phases, total_tokens)
    else:
        phase_lengths(phases, total_tokens, seq_len)


def phase_lengths(phases: Sequence[PhaseConfig], total_tokens: int | None, seq_len: int) -> list[int | None]:
    """Tokens of each phase that begins within a training of `total_tokens` (None: one as long as the phases).

    A phase that others follow is rounded up to whole blocks of 4,096 rows of `seq_len` tokens; the last one has what
    they leave it. A last phase without tokens lasts until the end, which is None where the end is not known.

    Raises:
        ConfigError: phases that do not cover the training, or a length that the blocks would change by more than 1 %.
    """
    _require_cover(phases, total_tokens)
    end, block = total_tokens, BLOCK * seq_len
    if end is None and phases and phases[-1].length is not None:
        end = sum(phase.length or 0 for phase in phases)
    lengths: list[int | None] = []
    asked = read = 0  # where the phase begins: by the lengths as given, and in whole blocks
    for index, phase in enumerate(phases):
        if end is None and phase.length is None:
            lengths.append(None)
        elif phase.length is not None and (end is None or asked + phase.length < end):
            lengths.append(phase.length)
            asked += phase.length
            read += _whole_blocks(phase.length, block, f"data.mixture.{index}")
        else:
            assert end is not None, "only a last phase is open"
            # What the end of the run cuts has no length of its own to keep: it only has to begin.
            whole = phase.length == end - asked
            _require_room(index, end, asked, read, block, (1 - _ROUNDING) * (end - asked) if whole else 1)
            lengths.append(end - read)
            break
    return lengths


def neighbours(tokens: int, unit: int) -> str:
    """The multiples of `unit` next below and above."""
    below = tokens // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _require_cover(phases: Sequence[PhaseConfig], total_tokens: int | None) -> None:
    for index, phase in enumerate(phases[:-1]):
        if phase.length is None:
            raise ConfigError(
                f"data.mixture.{index}.tokens is not set, so the phases after it would never begin: set it; only the "
                f"last phase may last until the end."
            )
    covered = sum(phase.length or 0 for phase in phases)
    if total_tokens is not None and phases and phases[-1].length is not None and covered < total_tokens:
        raise ConfigError(
            f"data.mixture covers {covered:,} tokens of a training of {total_tokens:,}: lengthen the last phase, or "
            f"leave out its tokens, so that it lasts until the end."
        )


def _whole_blocks(length: int, block: int, place: str) -> int:
    rounded = -(-length // block) * block
    if rounded - length > _ROUNDING * length:
        raise ConfigError(
            f"{place} lasts {length:,} tokens, but a phase that others follow is read in whole blocks of {block:,} "
            f"tokens ({BLOCK} rows), so it would last {rounded:,}: give it {neighbours(length, block)} tokens, or "
            f"join it with the next phase."
        )
    return rounded


def _require_room(index: int, end: int, asked: int, read: int, block: int, least: float) -> None:
    """The last phase must begin within the run, and keep its length if it has one."""
    if end - read >= least:
        return
    raise ConfigError(
        f"data.mixture.{index} has the last {end - asked:,} of {end:,} tokens, of which {max(end - read, 0):,} are "
        f"left when the phases before it are read in whole blocks of {block:,} tokens ({BLOCK} rows): give each of "
        f"those a multiple of {block:,}, or train on more tokens."
    )
