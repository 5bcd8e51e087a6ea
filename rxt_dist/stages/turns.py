"""The rows of a batch of dialogues in the order in which they are computed: turn by turn, without those that are not
there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.data.interactions import NO_LOSS, answer_labels, answer_parts, are_system_prompts

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Rows are as wide as the longest turn needs, in steps that products of matrices like.
_WIDTH_STEP = 8


class TurnEnds(NamedTuple):
    """Where a turn ends among all rows that are read, all rows that are written, and all labels; and how many dialogues
    are still alive in it."""

    read: int
    written: int
    labels: int
    living: int


@dataclass(frozen=True)
class TurnRows:
    """Rows of B dialogues, turn after turn, in a turn the longest dialogue first. Every turn has at least one row that
    is read, and but for the first one that is written, since other ranks may have some: then it counts for nothing.

    turns: of each turn, see `TurnEnds`. The row that is written before turn u is read is row u - 1 of its dialogue.
    tokens_RT: int64, rows that are read, no wider than the longest turn needs; valid_RT: bool, False on padding and in
        a row that counts for nothing.
    readers_R: int64, the dialogue of each; others_R: another one, of a batch of an even number of dialogues.
    written_RT: int64, rows that are written; written_keys_RT: bool, False on padding but for the first token of a row.
    labelled_P: int64, the positions among the R * T that have a label; targets_P: the labels; turn_P: their turns;
    part_P: the part of the answer that each is of, as in `answer_parts`.
    value_N: int64, the labels (of the P) that belong to values that are asked for; ask_N: to which.
    distance_N: int64, for each of these the place of its distance among those that have a figure, or their number.
    system_B: bool, dialogues whose first row is a system prompt, which is written and not read.
    labels, read_tokens, reads, writes: how many there are that count.
    """

    turns: tuple[TurnEnds, ...]
    tokens_RT: Tensor
    valid_RT: Tensor
    readers_R: Tensor
    others_R: Tensor
    written_RT: Tensor
    written_keys_RT: Tensor
    labelled_P: Tensor
    targets_P: Tensor
    turn_P: Tensor
    part_P: Tensor
    value_N: Tensor
    ask_N: Tensor
    distance_N: Tensor
    system_B: Tensor
    labels: int
    read_tokens: int
    reads: int
    writes: int

    def reads_of(self, first: int, end: int) -> slice:
        """Rows that are read in turns [first, end)."""
        return slice(self.turns[first - 1].read if first else 0, self.turns[end - 1].read)

    def writes_of(self, first: int, end: int) -> slice:
        """Rows that are written before turns [first, end) are read."""
        return slice(self.turns[first - 1].written if first else 0, self.turns[end - 1].written if end else 0)

    def labels_of(self, first: int, end: int) -> slice:
        """Labels of turns [first, end)."""
        return slice(self.turns[first - 1].labels if first else 0, self.turns[end - 1].labels)

    def living(self, turn: int) -> int:
        """How many dialogues, the first ones, have this turn."""
        return self.turns[turn].living


def rows_of(batch: TurnBatch, train_mode: bool, distances: tuple[int, ...]) -> tuple[TurnRows, Ints]:
    """The rows of a batch, and the order in which its dialogues stand there.

    Args:
        train_mode: as in `answer_labels`.
        distances: those that have a figure of their own.
    """
    order_B = np.argsort(-(batch.lengths_BU.numpy() > 0).sum(1), kind="stable")
    tensors = batch.tokens_BUT[..., : _width(batch)], batch.lengths_BU, batch.recalls_BU3
    tokens_BUT, length_BU, recalls_BU3 = (_with_second_turn(tensor.numpy()[order_B]) for tensor in tensors)
    is_live_BU = length_BU > 0
    is_system_B = is_live_BU[:, 0] & are_system_prompts(tokens_BUT[:, 0], batch.system_query)
    is_read_BU = is_live_BU.copy()
    is_read_BU[is_system_B, 0] = False
    readers = [_or_first(is_read) for is_read in is_read_BU.T]
    writers = [_or_first(is_live) for is_live in is_live_BU.T[1:]]
    reader_R, turn_R = _flat(readers, 0)
    writer_R, written_turn_R = _flat(writers, 1)
    is_read_R = is_read_BU[reader_R, turn_R]
    tokens_RT, width = tokens_BUT[reader_R, turn_R], tokens_BUT.shape[2]
    valid_RT = (np.arange(width) < length_BU[reader_R, turn_R][:, None]) & is_read_R[:, None]
    labels_RT = answer_labels(tokens_RT, train_mode)
    labels_RT[~is_read_R] = NO_LOSS
    labelled_P = np.flatnonzero(labels_RT != NO_LOSS)
    labels_R = (labels_RT != NO_LOSS).sum(1)
    turn_P = np.repeat(turn_R - is_system_B[reader_R], labels_R)
    value_N, ask_N, distance_N = _asked(recalls_BU3[reader_R, turn_R], labelled_P, width, distances)
    arrays = {
        "tokens_RT": tokens_RT,
        "valid_RT": valid_RT,
        "readers_R": reader_R,
        "others_R": _others(order_B)[reader_R],
        "written_RT": tokens_BUT[writer_R, written_turn_R - 1],
        "written_keys_RT": np.arange(width) < np.maximum(length_BU[writer_R, written_turn_R - 1], 1)[:, None],
        "labelled_P": labelled_P,
        "targets_P": labels_RT.reshape(-1)[labelled_P],
        "turn_P": turn_P,
        "part_P": answer_parts(tokens_RT, labels_RT).reshape(-1)[labelled_P],
        "value_N": value_N,
        "ask_N": ask_N,
        "distance_N": distance_N,
        "system_B": is_system_B,
    }
    ends = (
        np.cumsum([len(each) for each in readers]),
        np.cumsum([0, *(len(each) for each in writers)]),
        np.cumsum(np.bincount(turn_R, labels_R, len(readers)).astype(np.int64)),
        is_live_BU.sum(0),
    )
    rows = TurnRows(
        turns=tuple(TurnEnds(*map(int, each)) for each in zip(*ends, strict=True)),
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        labels=len(labelled_P),
        read_tokens=int(valid_RT.sum()),
        reads=int(is_read_R.sum()),
        writes=int(is_live_BU[:, 1:].sum()),
    )
    return rows, order_B


def _width(batch: TurnBatch) -> int:
    """Columns that have a token of some turn; what is beyond them is padding in every row."""
    longest = max(1, int(batch.lengths_BU.max()))
    return -(-longest // _WIDTH_STEP) * _WIDTH_STEP


def _with_second_turn(array_BU: Ints) -> Ints:
    """Where no dialogue has a second turn, one of nobody, so that all parts take part in every step."""
    if array_BU.shape[1] > 1:
        return array_BU
    return np.concatenate([array_BU, np.zeros_like(array_BU)], axis=1)


def _or_first(is_wanted_B: Bools) -> Ints:
    """The wanted dialogues; the first where none is."""
    found = np.flatnonzero(is_wanted_B)
    return found if len(found) else np.zeros(1, dtype=np.int64)


def _flat(dialogues: list[Ints], first: int) -> tuple[Ints, Ints]:
    """The dialogue and the turn of each row, given the dialogues of each turn from `first` on."""
    turns = [np.full(len(each), turn) for turn, each in enumerate(dialogues, start=first)]
    return np.concatenate(dialogues), np.concatenate(turns)


def _others(order_B: Ints) -> Ints:
    """Where each dialogue's neighbour stands, of pairs before they were put in order."""
    if len(order_B) % 2:
        return np.arange(len(order_B))
    place_B = np.argsort(order_B)
    return place_B[order_B ^ 1]


def _asked(recalls_R3: Ints, labelled_P: Ints, width: int, distances: tuple[int, ...]) -> tuple[Ints, Ints, Ints]:
    """Values that are asked for, all of whose tokens have a label: their labels, which value each belongs to, and the
    place of each value's distance."""
    row_N = np.flatnonzero(recalls_R3[:, 0] > 0)
    distance_N, first_N, end_N = recalls_R3[row_N].T
    lengths_N = end_N - first_N
    ask_N = np.repeat(np.arange(len(row_N)), lengths_N)
    # A token is predicted at the position before it.
    offset_N = np.arange(len(ask_N)) - np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)
    position_N = (row_N * width + first_N - 1)[ask_N] + offset_N
    value_N = np.minimum(np.searchsorted(labelled_P, position_N), max(0, len(labelled_P) - 1))
    has_label_N = labelled_P[value_N] == position_N if len(labelled_P) else np.zeros(len(position_N), dtype=bool)
    is_whole_N = (lengths_N > 0) & (np.bincount(ask_N[~has_label_N], minlength=len(row_N)) == 0)
    kept_N = is_whole_N[ask_N]
    ask_N = (np.cumsum(is_whole_N) - 1)[ask_N[kept_N]]
    return value_N[kept_N], ask_N, _places(distance_N[is_whole_N], distances)


def _places(distance_N: Ints, distances: tuple[int, ...]) -> Ints:
    """The place of each distance among `distances`; their number where it is not among them."""
    known = np.array(distances, dtype=np.int64)
    place_N = np.searchsorted(known, distance_N)
    is_known_N = np.isin(distance_N, known)
    return np.where(is_known_N, place_N, len(known))
