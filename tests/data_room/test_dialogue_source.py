"""Dialogues as a run's data source: shapes that all ranks share, held-out dialogues, blanks, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_run import SEQ_LEN, build_interaction_shards, build_shards

from data_prep.interactions.build import InteractionRequest, build_interactions
from rxt_dist.config.load import load_run
from rxt_dist.config.run import RunConfig
from rxt_dist.data.dialogue_source import DialogueSource
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.interactions import are_system_prompts
from rxt_dist.errors import DataError
from rxt_dist.stages.base import stage_class

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"
TURNS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(documents, dialogues)."""
    documents = build_shards(tmp_path_factory.mktemp("documents"))
    chats = build_interaction_shards(tmp_path_factory.mktemp("chats"), documents / "tokenizer.json", "dialogues")
    return documents, chats


def run_of(folder: Path, *overrides: str, kind: str = "memory") -> RunConfig:
    stage = f"stage={{kind: {kind}}}"
    return load_run(DEMO, [f"data.path={folder}", "data.seq_len=null", "train.total_tokens=65536", stage, *overrides])


def source_of(folder: Path, *overrides: str) -> DialogueSource:
    return DialogueSource(run_of(folder, *overrides), TURNS)


def test_it_says_what_the_dataset_says(folders: tuple[Path, Path]) -> None:
    source = source_of(folders[1])
    dataset = DialogueDataset(folders[1])
    assert source.digests == (dataset.manifest.root_digest,)
    assert source.row_tokens == TURNS * SEQ_LEN
    assert source.facts.seq_len == SEQ_LEN
    assert [found.name for found in source.sources] == ["en", "pl"]
    assert source.sources[0].train.totals.rows == len(DialogueDataset(folders[1], "train", "en"))
    assert source.held_out(1) == len(DialogueDataset(folders[1], "eval", "pl")) > 0


def test_parts_are_the_dialogues_of_the_order_in_one_shape(folders: tuple[Path, Path]) -> None:
    """Two ranks see the same turns and the same width, those of the longest dialogue of both."""
    source = source_of(folders[1])
    positions = np.arange(16, dtype=np.int64)
    whole = source.read(positions, slice(0, 16))
    halves = [source.read(positions, slice(start, start + 8)) for start in (0, 8)]
    for name in ("tokens_BUT", "lengths_BU", "samples_B"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert whole.tokens_BUT.shape[1] == TURNS
    assert whole.tokens_BUT.shape[2] == whole.lengths_BU.max()
    sources, rows = source.order.rows(positions)
    for at, (own, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
        turns = DialogueDataset(folders[1], "train", ("en", "pl")[own]).dialogue(row)[:TURNS]
        for turn, ids in enumerate(turns):
            assert whole.tokens_BUT[at, turn, : len(ids)].tolist() == ids.tolist()
            assert whole.lengths_BU[at, turn] == len(ids)
    assert whole.samples_B.tolist() == positions.tolist()
    assert whole.real_tokens == int((whole.tokens_BUT > 0).sum())
    parts = whole.micro_batches(4)
    assert {part.tokens_BUT.shape for part in parts} == {(4, *whole.tokens_BUT.shape[1:])}
    with pytest.raises(ValueError, match="16 dialogues cannot be split into micro-batches of 5"):
        whole.micro_batches(5)


def test_a_rank_whose_dialogues_are_short_reads_as_many_turns_as_the_others(folders: tuple[Path, Path]) -> None:
    source = DialogueSource(run_of(folders[1]), 100)
    positions = np.arange(16, dtype=np.int64)
    each = [source.read(positions, slice(row, row + 1)) for row in range(16)]
    own = [int((batch.lengths_BU > 0).sum()) for batch in each]
    assert min(own) < max(own)
    assert {batch.tokens_BUT.shape[1] for batch in each} == {max(own)}


def test_held_out_dialogues_and_blanks_that_count_for_nothing(folders: tuple[Path, Path]) -> None:
    source = source_of(folders[1])
    rows = np.array([0, 1, -1, -1], dtype=np.int64)
    batch = source.read_held_out(1, rows, slice(1, 4))
    first = DialogueDataset(folders[1], "eval", "pl").dialogue(1)
    assert batch.tokens_BUT[0, 0, : len(first[0])].tolist() == first[0].tolist()
    assert (batch.lengths_BU[0] > 0).all()
    assert not batch.lengths_BU[1:].any()
    assert not batch.tokens_BUT[1:].any()
    assert source.read_held_out(1, rows, slice(2, 4)).real_tokens == 0


def test_what_holds_no_dialogues_is_refused_and_the_reverse(folders: tuple[Path, Path]) -> None:
    documents, chats = folders
    with pytest.raises(DataError, match="but dialogues are 'rxt-dialogues'"):
        source_of(documents)
    for kind in ("joint", "decoder", "sft"):
        run = run_of(chats, kind=kind)
        with pytest.raises(DataError, match="holds dialogues"):
            stage_class(run).source(run)


def test_a_batch_knows_the_system_prompts_of_alpha(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = folders[0] / "tokenizer.json"
    turns = [{"query": f"Is it {number}?", "answer": "Yes."} for number in range(3)]
    record = {"interactions": turns, "system": "Be brief.", "language": "en"}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record | {"n": n}) + "\n" for n in range(8)))
    request = InteractionRequest(
        (tmp_path / "chats.jsonl",), tmp_path / "alpha", tokenizer, SEQ_LEN, "dialogues", "alpha", 0.0, workers=1
    )
    build_interactions(request)
    batch = source_of(tmp_path / "alpha").read(np.arange(4, dtype=np.int64), slice(0, 4))
    for part in (batch, *batch.micro_batches(2)):
        assert are_system_prompts(part.tokens_BUT[:, 0].numpy(), part.system_query).all()
        assert not are_system_prompts(part.tokens_BUT[:, 1].numpy(), part.system_query).any()


def test_another_tokenizer_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = build_shards(tmp_path / "other", seq_len=32) / "tokenizer.json"
    text = other.read_text().replace('"vocab"', '"vocab" ', 1).replace('"a":', '"a~":', 1)
    other.write_text(text)
    with pytest.raises(DataError, match="tokenizer"):
        source_of(folders[1], f"data.tokenizer={other}")


def test_phases_read_other_dialogues_of_the_same_lengths_only(folders: tuple[Path, Path], tmp_path: Path) -> None:
    documents, chats = folders
    tokenizer = documents / "tokenizer.json"
    other = build_interaction_shards(tmp_path, tokenizer, "dialogues", seq_len=128)
    mixture = f"data.mixture=[{{tokens: 32768, by_size: true}}, {{by_size: true, path: {other}}}]"
    with pytest.raises(DataError, match=r"has turns of up to 128 tokens, but .* of up to 64: build it again"):
        source_of(chats, mixture)


def test_phases_choose_dialogues_by_their_source(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """What dialogues ask of a memory can grow with the tokens trained: easy ones first, then both, then other data."""
    block = 4096 * TURNS * SEQ_LEN
    other = build_interaction_shards(tmp_path, folders[0] / "tokenizer.json", "dialogues", text_bytes=60_000)
    phases = (
        f"{{tokens: {block}, weights: {{en: 1}}}}, {{tokens: {block}, weights: {{en: 1, pl: 3}}}}, "
        f"{{weights: {{pl: 1}}, path: {other}}}"
    )
    source = source_of(
        folders[1], f"data.mixture=[{phases}]", f"train.total_tokens={3 * block}", "data.max_epochs=1000"
    )
    assert [found.name for found in source.sources] == ["en", "pl", "en@2", "pl@2"]
    assert len(source.digests) == 2
    shares = []
    for first in range(0, 3 * 4096, 4096):
        numbers, _ = source.order.rows(np.arange(first, first + 4096, dtype=np.int64))
        shares.append((np.bincount(numbers, minlength=4) / 4096).tolist())
    assert shares == [[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 0, 1]]
    # A batch at an edge has dialogues of both phases.
    positions = np.arange(2 * 4096 - 4, 2 * 4096 + 4, dtype=np.int64)
    numbers, rows = source.order.rows(positions)
    batch = source.read(positions, slice(0, 8))
    for at, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
        folder, name = folders[1] if number < 2 else other, ("en", "pl")[number % 2]
        turns = DialogueDataset(folder, "train", name).dialogue(row)[:TURNS]
        assert [int(length) for length in batch.lengths_BU[at] if length] == [len(turn) for turn in turns]
        assert batch.tokens_BUT[at, 0, : len(turns[0])].tolist() == turns[0].tolist()
