"""Rows of whole dialogues for a model without a memory: its history is what it has read before in its row.

    python histories.py DIALOGUES OUT ROW_TOKENS

A dialogue of `rxt-dist data interactions --kind dialogues` becomes one segment, `[BOS] turn [EOS] turn [EOS] ...`, with
one [BOS]; the ids of its turns are the same otherwise, so that the same tokens carry loss.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.building.builder import rows_manifest
from data_prep.building.rowstream import Ids, RowStream
from rxt_dist.data.dialogues import DialogueDataset, load_dialogue_manifest
from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, SourceInfo, SplitInfo, digest_json
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import INTERACTION_BOUNDARIES, PackedRows
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec, ShardWriter


def history(turns: list[npt.NDArray[np.uint16]]) -> npt.NDArray[np.uint16]:
    """The ids of a dialogue's turns, each of which keeps its [EOS]; [BOS] stands before the first."""
    return np.concatenate([turns[0], *(turn[1:] for turn in turns[1:])])


def write_histories(dialogues: Path, out: Path, row_tokens: int) -> None:
    """Write a dataset of rows, whose evaluation part is that of the dialogues; no dialogue may be longer than a row."""
    made_from = load_dialogue_manifest(dialogues)
    spec = ShardSpec(
        row_tokens,
        made_from.vocab_size,
        made_from.tokenizer_sha256,
        PACKING_VERSION,
        digest_json({"histories": row_tokens, "of": made_from.root_digest}),
        INTERACTION_BOUNDARIES,
    )
    sources = []
    for item in made_from.sources:
        splits = {split: _write(dialogues, item.name, split, out, spec) for split in SPLITS}
        sources.append(SourceInfo(item.name, item.language, **splits))
    shutil.copyfile(dialogues / TOKENIZER_FILE, out / TOKENIZER_FILE)
    finish_dataset(out, rows_manifest(spec, made_from.inputs, tuple(sources)), [])


def _write(dialogues: Path, source: str, split: str, out: Path, spec: ShardSpec) -> SplitInfo:
    dataset = DialogueDataset(dialogues, split, source)
    stream = RowStream(ShardWriter(out, f"{source}/{split}", "all", spec, _check), spec.seq_len)
    for index in range(len(dataset)):
        ids = history(dataset.dialogue(index))
        if len(ids) <= spec.seq_len:
            # The packer puts [BOS] and the last [EOS] around what it is given.
            stream.add(Ids(index, ids[1:-1], 0))
        else:
            assert split == "eval", f"a dialogue of {len(ids)} tokens to train on, in rows of {spec.seq_len}"
    return stream.finish()


def _check(rows: PackedRows, vocab_size: int) -> None:
    """A segment is a whole dialogue: the project's own check wants one interaction."""
    assert int(rows.tokens_RT.max(initial=0)) < vocab_size
    assert not rows.seg_off_I.any(), "a dialogue was cut"


if __name__ == "__main__":
    write_histories(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
