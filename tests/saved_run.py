"""A run directory with a checkpoint of given weights, made without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from safetensors.torch import save_file

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.model import PartName
from rxt_dist.config.stages import STAGES, JointConfig, StageEntry
from rxt_dist.model.reactive import ReactiveTransformer


class WholeConfig(JointConfig):
    """A stage that builds every part."""

    kind: Literal["whole"] = "whole"  # type: ignore[assignment]

    def parts(self) -> tuple[PartName, ...]:
        return ("embedding", "decoder", "lm_head", "encoder", "mlm_head", "memory_attention")


class DecoderOnlyConfig(JointConfig):
    """A stage that builds the decoder."""

    kind: Literal["decoder-only"] = "decoder-only"  # type: ignore[assignment]

    def parts(self) -> tuple[PartName, ...]:
        return ("embedding", "decoder", "lm_head")


@contextmanager
def whole_stage() -> Iterator[None]:
    """For runs of stages that build every part, or the decoder alone, which only these tests have."""
    with pytest.MonkeyPatch.context() as patched:
        for kind, config in (("whole", WholeConfig), ("decoder-only", DecoderOnlyConfig)):
            patched.setitem(STAGES, kind, StageEntry(config, "rxt_dist.stages.joint:JointStage"))
        yield


def write_run(
    directory: Path, network: ReactiveTransformer, stage: str = "whole", step: int = 7, data: Path | None = None
) -> Path:
    """The directory of a run of this network."""
    content: dict[str, Any] = {
        "name": directory.name,
        "model": network.config.model_dump(mode="json"),
        "stage": {"kind": stage},
        "data": {"path": str(data or directory / "data")},
        "train": {"total_tokens": 10**6, "global_batch_tokens": 256},
        "checkpoint": {"every_tokens": 256},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.resolved.yaml").write_text(yaml.safe_dump(content))
    store = CheckpointStore(directory / "checkpoints", 2)
    path = store.begin(step) / "rank-00000.safetensors"
    save_file(
        {f"weight|{name}|0": value.detach().flatten().clone() for name, value in network.named_parameters()}, path
    )
    store.commit(step, [store.record(path)], {"run_id": "abc", "tokens": 9000})
    return directory
