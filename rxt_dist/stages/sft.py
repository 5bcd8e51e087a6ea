"""Fine-tuning on single interactions: only what the model has to answer carries loss.

Everything else is as in the stage that came before, `joint` or `decoder`. No interaction of a row sees another one,
neither in self-attention nor in the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import DecoderSftConfig, SftConfig
from rxt_dist.data.interactions import answer_labels
from rxt_dist.data.loader import TokenRows
from rxt_dist.data.row_source import RowSource
from rxt_dist.data.rows import INTERACTION_BOUNDARIES
from rxt_dist.stages.decoder import DecoderStage
from rxt_dist.stages.joint import JointStage


class SftStage(JointStage):
    """Stage 'sft': encoder and decoder on interactions; the encoder restores masked tokens of all parts."""

    @classmethod
    def source(cls, run: RunConfig) -> RowSource:
        """See `Stage.source`."""
        return RowSource(run, INTERACTION_BOUNDARIES)

    def labels(self, rows: TokenRows) -> Tensor:
        """int64 [B, T]: as `answer_labels`."""
        assert isinstance(self.config, SftConfig)
        return _labels(rows, self.config.train_mode)


class DecoderSftStage(DecoderStage):
    """Stage 'decoder-sft': the decoder alone on interactions, under a memory that says nothing."""

    @classmethod
    def source(cls, run: RunConfig) -> RowSource:
        """See `Stage.source`."""
        return RowSource(run, INTERACTION_BOUNDARIES)

    def labels(self, rows: TokenRows) -> Tensor:
        """int64 [B, T]: as `answer_labels`."""
        assert isinstance(self.config, DecoderSftConfig)
        return _labels(rows, self.config.train_mode)


def _labels(rows: TokenRows, train_mode: bool) -> Tensor:
    return torch.from_numpy(answer_labels(rows.tokens_BT.numpy(), train_mode))
