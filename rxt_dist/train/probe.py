"""The loss of a few held-out rows, kept in every checkpoint and computed again after it was loaded.

File hashes and the checksum of the state compare bits; this compares what the model does with them, and would notice
weights that arrived but are not computed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rxt_dist.checkpoint.store import Checkpoint
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError
from rxt_dist.stages.base import DataSource, Stage
from rxt_dist.train.evaluate import evaluate_group, sources_without_evaluation

# Differences that other ranks, kernels and orders of summation explain: relative to the loss, or to 1 where it is less.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def measure_probe(engine: Engine, stage: Stage, data: DataSource) -> dict[str, Any] | None:
    """The loss of one group of held-out rows of the first source that has some, of which data; all ranks together.

    None where there are no such rows, or the stage predicts nothing.
    """
    passed_over = sources_without_evaluation(data, stage)
    chosen = [index for index, source in enumerate(data.sources) if source.name not in passed_over][:1]
    if not chosen or not any(term.title for term in stage.terms):
        return None
    loss = evaluate_group(engine, stage, data, chosen[0])
    precision, digest = stage.run.train.precision, data.digests[data.order.sources[chosen[0]].dataset]
    return {"source": data.sources[chosen[0]].name, "data": digest, "precision": precision, "loss": loss}


def check_probe(engine: Engine, stage: Stage, data: DataSource, checkpoint: Checkpoint) -> str:
    """Compare the loss of the loaded model with the saved one; all ranks together. Returns what there is to say.

    Raises:
        CheckpointError: they differ by more than another topology explains.
    """
    saved: Mapping[str, Any] | None = checkpoint.meta.get("probe")
    if saved is None:
        return f"{checkpoint.path.name} holds no loss of held-out rows, so none is compared"
    found = measure_probe(engine, stage, data)
    if found is None or (found["source"], found["data"]) != (saved["source"], saved["data"]):
        return f"the held-out rows are others than at {checkpoint.path.name}, so their loss is not compared"
    tolerance = max(_TOLERANCE[saved["precision"]], _TOLERANCE[found["precision"]])
    if not abs(found["loss"] - saved["loss"]) <= tolerance * max(1.0, abs(saved["loss"])):
        raise CheckpointError(
            f"The model loaded from {checkpoint.path} has a loss of {found['loss']:.6g} on held-out rows of source "
            f"'{saved['source']}', but {saved['loss']:.6g} was saved: it does not compute what it did. No checkpoint "
            f"was changed. Was the program or a library? Resume with the versions that the manifest names, or "
            f"begin from an earlier checkpoint (rxt-dist train --from)."
        )
    return f"loss of held-out rows {found['loss']:.6g}, saved {saved['loss']:.6g}"
