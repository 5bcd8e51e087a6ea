"""Rows of interactions: labels and the grammar; dialogues on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data import dialogues
from rxt_dist.data.dialogues import (
    DialogueDataset,
    DialogueManifest,
    DialogueSource,
    DialogueSplit,
    DialogueTotals,
    DialogueWriter,
    dialogue_metadata,
)
from rxt_dist.data.interactions import answer_labels, check_interaction_rows
from rxt_dist.data.packing import pack
from rxt_dist.data.rows import MASK_ID, SPECIAL_TOKENS, UNK_ID, PackedRows
from rxt_dist.errors import ConfigError, DataError

PAD, BOS, EOS = 0, 2, 3
Q, A, T, C, U, I = (SPECIAL_TOKENS[f"[{name}]"] for name in "QATCUI")  # noqa: E741 - the token's own letter
Dialogue = list[list[int]]


def _interaction(asked: int, parts: dict[int, list[int]]) -> list[int]:
    body = [item for marker in (I, asked, T, A, C) if marker in parts for item in (marker, *parts[marker])]
    return [BOS, *body, EOS]


@st.composite
def interactions(draw: st.DrawFn) -> list[int]:
    """Any interaction that the grammar allows, ids up to 65,535."""
    text = st.lists(st.integers(11, 65_535), max_size=6)
    asked = draw(st.sampled_from([Q, U]))
    answer_side = draw(st.sampled_from([(A,), (T, A), (A, C), (T, C), (T, A, C)]))
    with_internal = draw(st.booleans())
    parts = {marker: draw(text) for marker in (asked, *answer_side, *((I,) if with_internal else ()))}
    return _interaction(asked, parts)


def _labels_by_reading(row: list[int]) -> list[int]:
    """The rule in words: the model produces what stands after the marker that follows the query, up to [EOS]."""
    labels = [-100] * len(row)
    producing = False
    for at, token in enumerate(row[:-1]):
        if token in (A, T, C):
            producing = True
        elif token in (BOS, EOS, PAD, Q, U, I):
            producing = False
        if producing:
            labels[at] = row[at + 1]
    return labels


@settings(max_examples=150, deadline=None)
@given(st.lists(interactions(), min_size=1, max_size=8), st.sampled_from([np.uint16, np.int64]))
@pytest.mark.slow
def test_labels_follow_the_rule_in_packed_rows(items: list[list[int]], dtype: type) -> None:
    rows = pack([np.array(item[1:-1], dtype=np.uint16) for item in items], list(range(len(items))), 40)
    check_interaction_rows(rows, 65_536)
    labels = answer_labels(rows.tokens_RT.astype(dtype))
    assert labels.dtype == np.int64
    assert labels.tolist() == [_labels_by_reading(row) for row in rows.tokens_RT.tolist()]


def test_the_opening_marker_carries_no_loss_and_later_ones_and_eos_do() -> None:
    row = [BOS, I, 20, Q, 21, T, 22, A, 23, C, 24, EOS, BOS, U, 25, A, 26, EOS, PAD, PAD]
    n = -100
    expected = [n, n, n, n, n, 22, A, 23, C, 24, EOS, n, n, n, n, 26, EOS, n, n, n]
    assert answer_labels(np.array([row], dtype=np.uint16)).tolist() == [expected]


@pytest.mark.parametrize(
    "inner",
    [
        [Q, 20],  # nothing produced
        [A, 20],  # nothing to answer
        [Q, 20, C, 21],  # a call that no mode precedes
        [Q, 20, T, 21],  # thinking alone
        [Q, 20, A, 21, T, 22],
        [Q, 20, T, 21, C, 22, A, 23],  # a call before its answer
        [Q, 20, U, 21, A, 22],
        [Q, 20, I, 21, A, 22],
        [Q, 20, Q, 21, A, 22],
        [20, Q, 21, A, 22],  # text before the first part
        [Q, 20, A, UNK_ID],
        [Q, 20, A, MASK_ID],
        [Q, 20, A, EOS, 21],
    ],
)
def test_rows_that_are_no_interactions_are_a_bug(inner: list[int]) -> None:
    rows = pack([np.array(inner, dtype=np.uint16)], [0], 16)
    with pytest.raises(AssertionError):
        check_interaction_rows(rows, 65_536)


def test_cut_interactions_foreign_ids_and_text_in_the_padding_are_bugs() -> None:
    rows = pack([np.array([Q, 20, A, 21], dtype=np.uint16)], [0], 8)
    check_interaction_rows(rows, 22)
    with pytest.raises(AssertionError, match="token id 21 >= vocabulary 21"):
        check_interaction_rows(rows, 21)
    with pytest.raises(AssertionError, match="was cut"):
        check_interaction_rows(replace(rows, seg_off_I=np.array([1], dtype=np.uint32)), 22)
    dirty = rows.tokens_RT.copy()
    dirty[0, -1] = 20
    with pytest.raises(AssertionError, match="PAD"):
        check_interaction_rows(PackedRows(dirty, *list(vars(rows).values())[1:]), 22)


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues
# ---------------------------------------------------------------------------------------------------------------------


def _dialogues(count: int) -> list[Dialogue]:
    rng = np.random.default_rng(count)
    made = []
    for _ in range(count):
        texts = [rng.integers(11, 65_536, rng.integers(1, 9)).tolist() for _ in range(2 * rng.integers(1, 9))]
        made.append([_interaction(Q, {Q: q, A: a}) for q, a in zip(texts[::2], texts[1::2], strict=True)])
    return made


def _write(root: Path, sources: dict[str, list[Dialogue]]) -> DialogueManifest:
    made = []
    for name, items in sources.items():
        writer = DialogueWriter(root, f"{name}/train", "u00000", 65_536, dialogue_metadata(64, "ab", "beta", "cd"))
        for item in items:
            writer.add([np.array(turn, dtype=np.uint16) for turn in item])
        split = DialogueSplit(DialogueTotals(len(items)), writer.finish())
        made.append(DialogueSource(name, name, split))
    manifest = DialogueManifest(
        seq_len=64,
        vocab_size=65_536,
        tokenizer_sha256="ab",
        spec_hash="cd",
        inputs=(),
        sources=tuple(made),
        template="beta",
    )
    (root / "dataset.json").write_text(json.dumps(manifest.to_dict()))
    return manifest


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Dialogue]]:
    monkeypatch.setattr(dialogues, "_BATCH_DIALOGUES", 7)
    monkeypatch.setattr(dialogues, "_SHARD_TOKENS", 1500)
    sources = {"en": _dialogues(100), "pl": _dialogues(31)}
    manifest = _write(tmp_path, sources)
    assert len(manifest.sources[0].train.shards) > 2
    return sources


def test_every_dialogue_comes_back_turn_by_turn(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    opened = DialogueDataset(tmp_path)
    assert len(opened) == 131
    read = [[turn.tolist() for turn in opened.dialogue(index)] for index in range(len(opened))]
    assert read == written["en"] + written["pl"]
    assert opened.dialogue(0)[0].dtype == np.uint16
    polish = DialogueDataset(tmp_path, source="pl", tokenizer_sha256="ab")
    assert [turn.tolist() for turn in polish.dialogue(30)] == written["pl"][30]
    assert len(DialogueDataset(tmp_path, "eval")) == 0
    for outside in (-1, 131):
        with pytest.raises(IndexError):
            opened.dialogue(outside)


def test_batches_are_padded_and_labelled(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    indices = [5, 99, 0, 120]
    expected = [(written["en"] + written["pl"])[index] for index in indices]
    batch = DialogueDataset(tmp_path).batch(indices)
    most, width = max(map(len, expected)), max(len(turn) for item in expected for turn in item)
    assert batch.tokens_BUT.shape == batch.labels_BUT.shape == (4, most, width)
    for b, item in enumerate(expected):
        turns = item + [[]] * (most - len(item))
        assert batch.lengths_BU[b].tolist() == [len(turn) for turn in turns]
        for n, turn in enumerate(turns):
            padded = turn + [PAD] * (width - len(turn))
            assert batch.tokens_BUT[b, n].tolist() == padded
            assert batch.labels_BUT[b, n].tolist() == _labels_by_reading(padded)


def test_a_batch_of_fixed_turns_cuts_and_pads(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    every = written["en"]
    short = next(index for index, item in enumerate(every) if len(item) < 4)
    long = next(index for index, item in enumerate(every) if len(item) > 4)
    batch = DialogueDataset(tmp_path).batch([short, long], turns=4)
    assert batch.lengths_BU.shape == (2, 4)
    assert batch.lengths_BU[0].tolist() == [len(turn) for turn in every[short]] + [0] * (4 - len(every[short]))
    assert batch.lengths_BU[1].tolist() == [len(turn) for turn in every[long][:4]]


def test_a_flipped_bit_is_found_before_a_dialogue_is_used(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    shard = tmp_path / "pl/train/u00000-000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    opened = DialogueDataset(tmp_path)
    opened.dialogue(0)
    with pytest.raises(DataError, match="blake3 differs"):
        opened.dialogue(100)


def test_what_is_no_dataset_of_dialogues_is_refused(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="made with tokenizer ab"):
        DialogueDataset(tmp_path, tokenizer_sha256="other")
    with pytest.raises(ConfigError, match="Did you mean 'pl'"):
        DialogueDataset(tmp_path, source="pll")
    with pytest.raises(DataError, match="is not a dataset"):
        DialogueDataset(tmp_path / "pl")
    shard = tmp_path / "pl/train/u00000-000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"u00000-000\.arrow has .* bytes instead of"):
        DialogueDataset(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        DialogueDataset(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"seq_len": 64', '"seq_len": 65'))
    with pytest.raises(DataError, match="root digest"):
        DialogueDataset(tmp_path)
    path.write_text('{"format": "rxt-shards", "version": 1}')
    with pytest.raises(DataError, match="'rxt-shards' version 1, but dialogues are"):
        DialogueDataset(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"dataset\.json cannot be read \(Is a directory\)"):
        DialogueDataset(tmp_path)


def test_a_batch_of_nothing_is_refused(written: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    opened = DialogueDataset(tmp_path)
    assert opened.batch([0], turns=1).tokens_BUT.shape[:2] == (1, 1)
    for indices, turns in (([0], 0), ([], None)):
        with pytest.raises(AssertionError, match="a batch of"):
            opened.batch(indices, turns)
