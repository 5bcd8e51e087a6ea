"""Dialogues that begin with a system prompt, from a record to the shard."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import golden_inputs
import numpy as np
import pytest

from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.columns import Columns
from data_prep.tokenizing.tokenizer import load_tokenizer
from rxt_dist.data.dialogues import DialogueDataset, DialogueManifest
from rxt_dist.data.interactions import (
    ANSWER_ID,
    INTERNAL_ID,
    NO_LOSS,
    QUERY_ID,
    are_system_prompts,
    check_interactions,
)
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.errors import DataError

TELL = {"query": "My dog is called Rex.", "answer": "I see."}
OTHER = {"query": "It is raining.", "answer": "Then stay inside."}
ASK = {"query": "What is my dog called?", "answer": "It is Rex.", "recall": {"distance": 2, "value": "Rex"}}
ASKED = {"interactions": [TELL, OTHER, ASK], "language": "en"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    return path


def build(tokenizer: Path, records: list[Any], name: str = "chats", **options: Any) -> Path:
    root = tokenizer.parent
    (root / f"{name}.jsonl").write_bytes(golden_inputs.lines(records))
    options = {"kind": "dialogues", "workers": 1, "eval_fraction": 0.0} | options
    build_interactions(InteractionRequest((root / f"{name}.jsonl",), root / name, tokenizer, 64, **options))
    return root / name


def test_a_dialogue_may_begin_with_a_system_prompt(tokenizer: Path) -> None:
    text = load_tokenizer(tokenizer)
    records = [ASKED | {"system": "Be brief."}, ASKED, ASKED | {"system": "  "}, ASKED | {"system": "word " * 200}]
    root = build(tokenizer, records, template="beta")
    data = DialogueDataset(root)
    assert [len(data.dialogue(index)) for index in range(len(data))] == [4, 3, 3], "one prompt fits no row"
    prompt = data.dialogue(0)[0]
    body = text.encode("SYSTEM INSTRUCTIONS\n\nBe brief.", add_special_tokens=False).ids
    assert prompt.tolist() == [BOS_ID, INTERNAL_ID, *body, EOS_ID]
    tokens_BUT = data.batch([0, 1]).tokens_BUT
    assert are_system_prompts(tokens_BUT.reshape(8, -1)).tolist() == [True] + [False] * 7
    for index in range(3):
        (distance, first, end), turn = data.recalls(index)[-1].tolist(), data.dialogue(index)[-1]
        assert (distance, text.decode(turn[first:end].tolist()).strip()) == (2, "Rex")
    assert data.recalls(0).tolist() == [[0, 0, 0], *data.recalls(1).tolist()]
    assert (data.batch([0]).labels_BUT[0, 0] == NO_LOSS).all()
    split = data.manifest.sources[0].train.totals
    labels = sum(int((data.batch([index]).labels_BUT != NO_LOSS).sum()) for index in range(3))
    assert (split.turns, split.targets) == (10, labels)
    columns = Columns((("system", "sys"),))
    theirs = build(tokenizer, [{"sys": "Be brief."} | ASKED], name="theirs", columns=columns, template="beta")
    assert len(DialogueDataset(theirs).dialogue(0)) == 4
    for template in ("alpha", "beta"):
        record = {"interactions": [OTHER], "system": "Be brief.", "language": "en"}
        folder = build(tokenizer, [record], name=f"single-{template}", kind="single", template=template)
        assert json.loads((folder / "interactions.json").read_text())["counts"]["parts_left_out"] == 1
    with pytest.raises(DataError, match="'system' is a list, not text"):
        build(tokenizer, [ASKED | {"system": ["x"]}], name="list")


def test_alpha_answers_a_query_that_is_always_the_same_with_its_system_prompt(tokenizer: Path) -> None:
    """Also where the records spell that query out; a query that only begins like it is one as all others."""
    text = load_tokenizer(tokenizer)
    spelt = {"query": "SYSTEM INSTRUCTIONS", "answer": "Be brief."}
    close = {"query": "SYSTEM INSTRUCTIONS, please", "answer": "Be brief."}
    said = [TELL, OTHER, ASK]
    records: list[Any] = [
        ASKED | {"system": "Be brief."},
        {"interactions": [spelt, *said], "language": "en"},
        {"interactions": [close, *said], "language": "en"},
        {"interactions": [TELL, spelt], "language": "en"},
        ASKED | {"system": "x" * (64 - 4 - 19 + 2)},  # two tokens too long, of a query of 19
    ]
    root = build(tokenizer, records, template="alpha")
    data = DialogueDataset(root)
    query = text.encode("SYSTEM INSTRUCTIONS", add_special_tokens=False).ids
    assert data.manifest.system_query == tuple(query)
    assert len(data) == 4, "a prompt is never shortened"
    body = text.encode("Be brief.", add_special_tokens=False).ids
    assert data.dialogue(0)[0].tolist() == [BOS_ID, QUERY_ID, *query, ANSWER_ID, *body, EOS_ID]
    assert all(one.tolist() == other.tolist() for one, other in zip(data.dialogue(0), data.dialogue(1), strict=True))
    batch = data.batch(range(4))
    assert batch.system_B.tolist() == [True, True, False, False]
    assert (batch.labels_BUT[:2, 0] == NO_LOSS).all()
    assert (batch.labels_BUT[2:, 0] != NO_LOSS).any(-1).all()
    assert (batch.labels_BUT[3, 1] != NO_LOSS).any()
    assert data.recalls(0).tolist()[-1][0] == 2
    report = json.loads((root / "interactions.json").read_text())
    assert report["counts"]["parts_left_out"] == 0
    assert data.manifest.sources[0].train.totals.targets == int((batch.labels_BUT != NO_LOSS).sum())
    # A dataset of an earlier version says nothing of it, and keeps its digest.
    manifest = json.loads((root / "dataset.json").read_text())
    assert manifest.pop("system_query") == query
    earlier = DialogueManifest.from_dict(manifest)
    assert earlier.system_query == ()
    assert earlier.root_digest == data.manifest.root_digest
    assert "system_query" not in earlier.to_dict()
    assert "system_query" not in json.loads((build(tokenizer, [ASKED], name="beta") / "dataset.json").read_text())


def test_only_the_first_turn_asks_nothing() -> None:
    prompt, turn = [BOS_ID, INTERNAL_ID, 90, EOS_ID], [BOS_ID, QUERY_ID, 90, ANSWER_ID, 91, EOS_ID]
    for order, firsts, fine in (
        ([prompt, turn, prompt, turn], [1, 0, 1, 0], True),
        ([prompt, turn], None, False),
        ([turn, prompt], [1, 0], False),
        ([prompt, prompt, turn], [1, 0, 0], False),
    ):
        tokens = np.concatenate(order).astype(np.uint16)
        lengths = np.array([len(part) for part in order])
        with nullcontext() if fine else pytest.raises(AssertionError, match="parts in an order"):
            check_interactions(tokens, lengths, None if firsts is None else np.array(firsts, dtype=bool))
