"""What a turn recalls, in the batches of a run."""

from __future__ import annotations

import json
from pathlib import Path

import golden_inputs
import numpy as np

from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.recall.make import RecallRequest, write_recall
from data_prep.tokenizing.tokenizer import load_tokenizer
from rxt_dist.config.load import load_run
from rxt_dist.data.dialogue_source import DialogueSource

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"


def test_made_dialogues_become_batches_whose_recalls_are_their_values(tmp_path: Path) -> None:
    """From the maker to what a stage is given, through an order of several sources."""
    root = tmp_path
    (root / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    asked = RecallRequest(distances=(1, 3), held_out_distances=(5,), count=40, held_out_count=10, turns=6)
    write_recall(root / "talks", asked)
    request = InteractionRequest((root / "talks",), root / "out", root / "tokenizer.json", 128, "dialogues", workers=1)
    build_interactions(request)
    stage = ["data.seq_len=null", "train.total_tokens=65536", "stage={kind: memory}"]
    run = load_run(DEMO, [f"data.path={root / 'out'}", *stage])
    source, text = DialogueSource(run, turns=4), load_tokenizer(root / "tokenizer.json")
    names = [item.name for item in source.sources]
    assert names == sorted(f"recall-{name}-{tag}" for tag in ("en", "pl")
                           for name in ("d1", "d3", "d1-values", "d3-values", "d5"))  # fmt: skip
    for item in source.sources:
        held_out = "values" in item.name or "d5" in item.name
        assert (item.train.totals.rows == 0) == held_out, item.name
        assert item.eval.totals.rows == 10 if held_out else 0 < item.eval.totals.rows < 40
    batch = source.read(np.arange(16, dtype=np.int64), slice(8, 16))
    assert batch.recalls_BU3.shape == (*batch.lengths_BU.shape, 3)
    parts = batch.micro_batches(4)
    assert [part.recalls_BU3.tolist() for part in parts] == [
        batch.recalls_BU3[:4].tolist(), batch.recalls_BU3[4:].tolist()
    ]  # fmt: skip
    values = {item["recall"]["value"] for path in (root / "talks").glob("*.jsonl")
              for line in path.read_text(encoding="utf-8").splitlines()
              for item in json.loads(line)["interactions"] if "recall" in item}  # fmt: skip
    found = 0
    for tokens_UT, recalls_U3 in zip(batch.tokens_BUT, batch.recalls_BU3, strict=True):
        for tokens_T, (distance, first, end) in zip(tokens_UT, recalls_U3.tolist(), strict=True):
            if distance:
                found += 1
                assert text.decode(tokens_T[first:end].tolist()).strip() in values
                assert distance <= 3
    assert found >= 8
    far = source.read_held_out(names.index("recall-d5-en"), np.array([0, 3, -1]), slice(0, 3))
    assert not far.recalls_BU3[2].any()
