"""Rows of interactions: how the parts of an interaction stand in a row, and which of its tokens carry loss.

An interaction is one event: what comes in (a query, or the result of a tool) and what the model makes of it.

    [BOS] [I]internal instruction  [Q]query | [U]tool result  [T]thinking  [A]answer  [C]tool call  [EOS]

A dialogue may begin with a system prompt, `[BOS] [I]SYSTEM INSTRUCTIONS text [EOS]`, which nobody answers. RxT-Alpha,
which has no [I], writes it as `[BOS] [Q]SYSTEM INSTRUCTIONS [A]text [EOS]`: what tells it apart is what it asks.

Parts may be absent, but there is always one of [Q] and [U], and then at least an answer or a tool call. The token after
the query is [A] (fast answer) or [T] (thinking first): the caller chooses it. Text has no control tokens (the tokenizer
cannot be made to spell them), so the ids of a row alone say where each part begins, and labels need no stored mask.

Loss is on everything that the model itself has to produce: the tokens of the [T], [A] and [C] parts, the markers
between them ([A] after thinking, [C]), and [EOS]. There is none on the query side, and on the marker that follows it
only where a stage has the model choose it itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rxt_dist.data.rows import BOS_ID, EOS_ID, PAD_ID, SPECIAL_COUNT, SPECIAL_TOKENS, PackedRows

QUERY_ID, ANSWER_ID, THINK_ID, CALL_ID, RESULT_ID, INTERNAL_ID = (
    SPECIAL_TOKENS[token] for token in ("[Q]", "[A]", "[T]", "[C]", "[U]", "[I]")
)
SYSTEM_QUERY = "SYSTEM INSTRUCTIONS"
SYSTEM_HEADING = f"{SYSTEM_QUERY}\n\n"
NO_LOSS = -100  # the label that cross-entropy leaves out
# The parts of an answer and the control token that each begins with; the last one is nothing but that token.
ANSWER_PARTS = {"thinking": THINK_ID, "answer": ANSWER_ID, "call": CALL_ID, "eos": EOS_ID}

# What may follow what, among the control tokens alone.
_FOLLOWS = {
    BOS_ID: (INTERNAL_ID, QUERY_ID, RESULT_ID),
    INTERNAL_ID: (QUERY_ID, RESULT_ID),
    QUERY_ID: (THINK_ID, ANSWER_ID),
    RESULT_ID: (THINK_ID, ANSWER_ID),
    THINK_ID: (ANSWER_ID, CALL_ID),
    ANSWER_ID: (CALL_ID, EOS_ID),
    CALL_ID: (EOS_ID,),
    EOS_ID: (BOS_ID,),
}
_MAY_FOLLOW = np.zeros((SPECIAL_COUNT, SPECIAL_COUNT), dtype=bool)
for _before, _after in _FOLLOWS.items():
    _MAY_FOLLOW[_before, list(_after)] = True

_IS_ANSWER_SIDE = np.zeros(SPECIAL_COUNT, dtype=bool)
_IS_ANSWER_SIDE[[THINK_ID, ANSWER_ID, CALL_ID]] = True
_PART_OF = np.full(SPECIAL_COUNT, len(ANSWER_PARTS))
_PART_OF[list(ANSWER_PARTS.values())] = range(len(ANSWER_PARTS))


def answer_labels(tokens_RT: npt.NDArray[np.integer], train_mode: bool = False) -> npt.NDArray[np.int64]:
    """Labels of R rows of interactions, int64 [R, T]: the next token where it carries loss, else -100.

    A position has a label exactly when it lies in a [T], [A] or [C] part, its marker included: the token after it is
    then one that the model has to produce, and no part but [EOS] follows the last of them. An answer that was cut off
    before its [EOS] ends without a label, as [PAD] is nothing to learn.

    Args:
        tokens_RT: ids of any integer type, each row starting with a control token ([BOS], or [PAD] in an empty row).
        train_mode: the marker after the query has loss too.
    """
    next_RT = tokens_RT[:, 1:]
    wanted_RT = _IS_ANSWER_SIDE[_openers(tokens_RT)[:, :-1]] & (next_RT != PAD_ID)
    if train_mode:
        # Of the markers of the answer side only the first follows a token that is not on it.
        is_marker_RT = _IS_ANSWER_SIDE[np.minimum(next_RT, SPECIAL_COUNT - 1)] & (next_RT < SPECIAL_COUNT)
        wanted_RT |= is_marker_RT
    labels = np.full(tokens_RT.shape, NO_LOSS, dtype=np.int64)
    np.copyto(labels[:, :-1], next_RT, where=wanted_RT)
    return labels


def answer_parts(tokens_RT: npt.NDArray[np.integer], labels_RT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which of ANSWER_PARTS each label of `answer_labels` is of, by its number there, int64 [R, T]; their number where
    there is no label. A marker is of the part that it begins."""
    parts_RT = np.full(tokens_RT.shape, len(ANSWER_PARTS))
    np.copyto(parts_RT[:, :-1], _PART_OF[_openers(tokens_RT)[:, 1:]], where=labels_RT[:, :-1] != NO_LOSS)
    return parts_RT


def _openers(tokens_RT: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """The control token that begins the part of each position, [R, T]."""
    flat = tokens_RT.reshape(-1)
    control_at = np.flatnonzero(flat < SPECIAL_COUNT)
    assert bool((tokens_RT[:, 0] < SPECIAL_COUNT).all()), "a row starts with text"
    # A part reaches from its control token to the next one; no part reaches into the next row, which opens its own.
    return np.repeat(flat[control_at], np.diff(control_at, append=len(flat))).reshape(tokens_RT.shape)


def check_interaction_rows(rows: PackedRows, vocab_size: int) -> None:
    """Assert what readers of interaction rows rely on: ids below the vocabulary, PAD only after the last segment, and
    every segment one whole interaction of the form above.

    Raises:
        AssertionError: the builder broke its own rule; this is a bug, never bad input.
    """
    tokens_RT, seq_len = rows.tokens_RT, rows.tokens_RT.shape[1]
    assert int(tokens_RT.max(initial=0)) < vocab_size, f"token id {tokens_RT.max()} >= vocabulary {vocab_size}"
    assert not bool(rows.seg_off_I.any()), "an interaction was cut"
    row_of_I = np.repeat(np.arange(rows.rows), rows.seg_count_R)
    used_R = np.bincount(row_of_I, weights=rows.seg_len_I, minlength=rows.rows).astype(np.int64)
    assert bool((used_R <= seq_len).all()), "segments longer than their row"
    used_RT = np.arange(seq_len) < used_R[:, None]
    assert not bool(tokens_RT[~used_RT].any()), "a token other than PAD after the last segment"
    check_interactions(tokens_RT[used_RT], rows.seg_len_I.astype(np.int64))


def are_system_prompts(tokens_RT: npt.NDArray[np.integer], system_query: tuple[int, ...] = ()) -> npt.NDArray[np.bool_]:
    """Which of R rows, each padded and of one interaction at most, ask nothing: bool [R]. Empty rows do not count.

    Args:
        system_query: the ids of SYSTEM_QUERY where that is how system prompts begin, in the template of RxT-Alpha.
    """
    asks_R = ((tokens_RT == QUERY_ID) | (tokens_RT == RESULT_ID)).any(1)
    if system_query and tokens_RT.shape[1] > len(system_query) + 2:
        opening = (BOS_ID, QUERY_ID, *system_query, ANSWER_ID)
        asks_R &= (tokens_RT[:, : len(opening)] != opening).any(1)
    return (tokens_RT[:, 0] == BOS_ID) & ~asks_R


def check_interactions(
    tokens_N: npt.NDArray[np.uint16], length_I: npt.NDArray[np.int64], is_first_I: npt.NDArray[np.bool_] | None = None
) -> None:
    """Assert that N tokens are whole interactions of these lengths, one after another.

    Args:
        is_first_I: those that begin a dialogue, which may be system prompts.

    Raises:
        AssertionError: see `check_interaction_rows`.
    """
    ends = np.cumsum(length_I)
    assert int(length_I.sum()) == len(tokens_N), "lengths and tokens differ"
    at = np.flatnonzero(tokens_N < SPECIAL_COUNT)
    controls = tokens_N[at]
    assert np.array_equal(at[controls == BOS_ID], ends - length_I), "BOS must open exactly the interactions"
    assert np.array_equal(at[controls == EOS_ID], ends - 1), "EOS must close exactly the interactions"
    is_known = _MAY_FOLLOW[controls[:-1], controls[1:]]
    if is_first_I is not None:
        is_prompt = (controls[:-1] == INTERNAL_ID) & (controls[1:] == EOS_ID)
        is_known = is_known | (is_prompt & is_first_I[np.searchsorted(ends, at[:-1], side="right")])
    assert bool(is_known.all()), "parts in an order that no interaction has"
    after_bos = ends - length_I + 1
    assert bool((tokens_N[after_bos] < SPECIAL_COUNT).all()), "text before the first part"
