"""What is in a dataset of dialogues: turns, lengths, doubles, and what is recalled how far. All of it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from rxt_dist.data.dialogues import DialogueDataset, DialogueManifest
from rxt_dist.data.manifest import SPLITS

_PERCENTILES = (50, 99)


def dialogue_statistics(
    root: Path, manifest: DialogueManifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Figures of each source: share of the tokens, turns of a dialogue, tokens of a turn, doubles, recalls by distance.

    `held_out_also_in_training`: held-out dialogues whose tokens stand in training too, of whatever source.

    Args:
        progress: told dialogues read and in all.

    Raises:
        DataError: a shard is missing or damaged.
    """
    total, done = manifest.totals.dialogues, 0
    hashes: dict[tuple[str, str], list[int]] = {}
    sources: dict[str, dict[str, Any]] = {}
    for source in manifest.sources:
        turns, lengths = [], []
        recalls: Counter[int] = Counter()
        for split in SPLITS:
            opened = DialogueDataset(root, split, source.name)
            here = hashes[source.name, split] = []
            for index in range(len(opened)):
                dialogue = opened.dialogue(index)
                here.append(xxhash.xxh3_64_intdigest(np.concatenate(dialogue).tobytes()))
                turns.append(len(dialogue))
                lengths += [len(turn) for turn in dialogue]
                recalls.update(filter(None, opened.recalls(index)[:, 0].tolist()))
                done += 1
                if done % 1024 == 0:
                    progress(done, total)
        sources[source.name] = {
            "language": source.language,
            "share": (source.train.totals + source.eval.totals).tokens / max(manifest.totals.tokens, 1),
            "turns": _lengths(np.array(turns)),
            "turn_tokens": _lengths(np.array(lengths)),
            "recalls": {str(distance): count for distance, count in sorted(recalls.items())},
        }
    trained = {number for (_, split), numbers in hashes.items() if split == "train" for number in numbers}
    for name, figures in sources.items():
        own = Counter(hashes[name, "train"] + hashes[name, "eval"])
        figures["duplicates"] = own.total() - len(own)
        figures["held_out_also_in_training"] = sum(number in trained for number in hashes[name, "eval"])
    return {"sources": sources}


def _lengths(values: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean, percentiles and longest; nothing of nothing."""
    if not len(values):
        return {}
    percentiles = {f"p{level}": float(np.percentile(values, level)) for level in _PERCENTILES}
    return {"mean": float(values.mean()), **percentiles, "longest": int(values.max())}
