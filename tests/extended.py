"""Stages that the tests add to the registry when they import this module.

`lm` is the one of docs/extending.md, added as somebody who follows the page would: a configuration class, a file, a
line. It has frozen parameters and two learning rates, and reads no memory. `encoder` has no experts, `frozen-experts`
does not train them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from rxt_dist.config import stages
from rxt_dist.config.model import PartName
from rxt_dist.losses import StageOutput
from rxt_dist.stages.base import Term
from rxt_dist.stages.joint import JointBatch, JointStage

PAGE = Path(__file__).parents[1] / "docs/extending.md"


def code(title: str) -> str:
    """The block of code that begins with the comment `# title`."""
    blocks = re.findall(r"```python\n# (.*?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [text for name, text in blocks if name == title]
    return found


def _add() -> None:
    exec(compile(code("rxt_dist/config/stages.py"), str(PAGE), "exec"), vars(stages))
    module = ModuleType("rxt_dist.stages.lm")
    sys.modules[module.__name__] = module
    exec(compile(code("rxt_dist/stages/lm.py"), str(PAGE), "exec"), vars(module))
    exec(f"STAGES |= {{\n{code('STAGES')}}}", vars(stages))


class EncoderConfig(stages.JointConfig):
    """Masked-token training of the encoder alone."""

    kind: Literal["encoder"] = "encoder"  # type: ignore[assignment]

    def parts(self) -> tuple[PartName, ...]:
        return ("embedding", "encoder", "mlm_head")


class EncoderStage(JointStage):
    """Masked-token loss; routes nothing."""

    terms = (Term("mlm", "masked tokens", predicts=True),)
    rows_together = 1

    def weights(self) -> Tensor:
        return torch.ones(1)

    def counts(self, micro: JointBatch) -> Tensor:
        return torch.tensor([micro.masked_P.numel()], dtype=torch.float64)

    def views(self, micro: JointBatch) -> dict[str, JointBatch]:
        return {"": micro}

    def forward(self, micro: JointBatch, load_ME: Tensor) -> StageOutput:
        model: Any = self.model
        encoded_LBTD = model.encoder(model.embedding(micro.encoder_tokens_BT), micro.positions_BT, micro.documents)
        masked_PD = encoded_LBTD[-1].flatten(0, 1).index_select(0, micro.masked_P)
        mlm = model.mlm_head(masked_PD, micro.masked_targets_P, self.chunk_tokens)
        return StageOutput(mlm.loss.reshape(1), mlm.correct.reshape(1), torch.zeros_like(load_ME, dtype=torch.int64))


if "lm" not in stages.STAGES:
    _add()
    Decoder: Any = stages.STAGES["lm"].config

    class FrozenExpertsConfig(Decoder):
        """The stage of the page, with its routed experts and routers as they begin."""

        kind: Literal["frozen-experts"] = "frozen-experts"  # type: ignore[assignment]

        def rate_group(self, parameter: str) -> str | None:
            return None if ".routed." in parameter else super().rate_group(parameter)

    stages.STAGES["frozen-experts"] = stages.StageEntry(FrozenExpertsConfig, stages.STAGES["lm"].code)
    stages.STAGES["encoder"] = stages.StageEntry(EncoderConfig, "extended:EncoderStage")
