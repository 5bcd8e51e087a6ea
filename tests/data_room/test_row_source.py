"""Rows of packed documents as a run's data source: parts of global batches, held-out rows, blanks, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rxt_dist.config.load import load_run
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import eval_reader
from rxt_dist.data.row_source import RowSource
from rxt_dist.errors import DataError
from rxt_dist.stages.base import stage_class

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"
SEQ_LEN = 32


def source_of(dataset_dir: Path, *overrides: str) -> RowSource:
    changes = [f"data.path={dataset_dir}", "data.seq_len=null", "train.total_tokens=4096", *overrides]
    return RowSource(load_run(DEMO, changes))


@pytest.fixture
def source(dataset_dir: Path) -> RowSource:
    return source_of(dataset_dir)


def test_it_says_what_the_dataset_says(source: RowSource, dataset_dir: Path) -> None:
    dataset = TokenDataset(dataset_dir)
    assert (source.digests, source.row_tokens) == ((dataset.digest,), SEQ_LEN)
    assert [one.name for one in source.sources] == ["en", "pl", "und"]
    facts = source.facts
    assert (facts.seq_len, facts.row_tokens, facts.vocab_size) == (SEQ_LEN, SEQ_LEN, 65_536)
    assert (facts.sources, facts.tokenizer_sha) == (("en", "pl", "und"), "ab" * 32)


def test_parts_of_a_global_batch_are_its_slices_in_the_planned_order(source: RowSource) -> None:
    positions = np.arange(8, 32)
    whole = source.read(positions, slice(0, 24))
    wanted, _ = source.order.rows(positions)
    assert whole.source_B.tolist() == wanted.tolist()
    for rank in range(3):
        part = slice(8 * rank, 8 * rank + 8)
        read = source.read(positions, part)
        assert read.samples_B.tolist() == positions[part].tolist()
        assert torch.equal(read.tokens_BT, whole.tokens_BT[part])
        assert torch.equal(read.source_B, whole.source_B[part])


def test_the_order_is_that_of_seed_and_budget(dataset_dir: Path) -> None:
    first = source_of(dataset_dir).read(np.arange(32), slice(0, 32)).tokens_BT
    assert torch.equal(source_of(dataset_dir).read(np.arange(32), slice(0, 32)).tokens_BT, first)
    assert not torch.equal(source_of(dataset_dir, "seed=8").read(np.arange(32), slice(0, 32)).tokens_BT, first)


def test_held_out_rows_are_those_of_the_evaluation_split(source: RowSource, dataset_dir: Path) -> None:
    dataset = TokenDataset(dataset_dir)
    for index in range(3):
        count = source.held_out(index)
        assert count == dataset.rows(index, "eval") < dataset.rows(index, "train")
        read = source.read_held_out(index, np.arange(count), slice(1, count))
        assert torch.equal(read.tokens_BT, eval_reader(dataset, index).read(np.arange(1, count)).tokens_BT)
        assert set(read.source_B.tolist()) == {index}


@pytest.mark.parametrize("real", [0, 1, 2, 3, 4])
def test_rows_that_fill_a_batch_up_count_for_nothing(real: int, source: RowSource) -> None:
    """The first `real` rows of a batch of four are as they stand, the others are padding with the same bounds."""
    sound = source.read_held_out(0, np.arange(4), slice(0, 4))
    rows = np.arange(4)
    rows[real:] = -1
    filled = source.read_held_out(0, rows, slice(0, 4))
    assert filled.rows == 4
    assert torch.equal(filled.tokens_BT[:real], sound.tokens_BT[:real])
    assert not filled.tokens_BT[real:].any()
    alone = sound.micro_batches(1)[:real]
    assert filled.real_tokens == sum(part.real_tokens for part in alone)
    assert filled.pairs == sum(part.pairs for part in alone)
    unpacked = filled.unpack()
    assert set(unpacked.segments_BT[real:].flatten().tolist()) <= {-1}
    assert torch.equal(unpacked.segments_BT[:real], sound.unpack().segments_BT[:real])
    assert torch.equal(unpacked.next_tokens()[:real], sound.unpack().next_tokens()[:real])
    assert set(unpacked.next_tokens()[real:].flatten().tolist()) <= {-100}


def test_what_was_counted_before_blanks_were_made_is_counted_anew(source: RowSource) -> None:
    sound = source.read_held_out(0, np.arange(4), slice(0, 4))
    assert sound.real_tokens > sound.first(2).real_tokens > 0
    assert sound.pairs > sound.first(2).pairs > 0


def test_interactions_are_not_documents(dataset_dir: Path) -> None:
    path = dataset_dir / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boundaries": "turns"}))
    with pytest.raises(DataError, match="holds turns, of which only the answers carry loss"):
        source_of(dataset_dir)


def test_documents_are_not_interactions(dataset_dir: Path) -> None:
    run = load_run(DEMO, [f"data.path={dataset_dir}", "data.seq_len=null", "stage={kind: sft}"])
    with pytest.raises(DataError, match="holds documents, which have no answers, but stage 'sft' reads interactions"):
        stage_class(run).source(run)


def test_a_tokenizer_that_is_none_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    for name, content in (("absent.json", None), ("broken.json", "{"), ("other.json", "[]")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=rf"data.tokenizer is .*{name}, which cannot be read as a tokenizer.json"):
            source_of(dataset_dir, f"data.tokenizer={path}")
