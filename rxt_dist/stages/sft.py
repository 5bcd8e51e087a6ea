"""Fine-tuning on single interactions: only what the model has to answer carries loss.

Everything else is as in the stage that came before, `joint` or `decoder`. No interaction of a row sees another one,
neither in self-attention nor in the memory.
"""

from __future__ import annotations

import torch

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import DecoderSftConfig, SftConfig
from rxt_dist.data.interactions import answer_labels, answer_parts
from rxt_dist.data.loader import TokenRows
from rxt_dist.data.row_source import RowSource
from rxt_dist.data.rows import INTERACTION_BOUNDARIES
from rxt_dist.stages.answers import PART_TERMS, Labels
from rxt_dist.stages.decoder import DecoderStage
from rxt_dist.stages.joint import JointStage


class _OnInteractions:
    """What is read and what of it is learnt."""

    run: RunConfig

    @classmethod
    def source(cls, run: RunConfig) -> RowSource:
        """See `Stage.source`."""
        return RowSource(run, INTERACTION_BOUNDARIES)

    def labels(self, rows: TokenRows) -> Labels:
        """As `answer_labels`, told apart by the parts of the answer."""
        assert isinstance(self.run.stage, SftConfig | DecoderSftConfig)
        tokens_BT = rows.tokens_BT.numpy()
        labels_BT = answer_labels(tokens_BT, self.run.stage.train_mode)
        return Labels(torch.from_numpy(labels_BT), torch.from_numpy(answer_parts(tokens_BT, labels_BT)))


class SftStage(_OnInteractions, JointStage):
    """Stage 'sft': encoder and decoder on interactions; the encoder restores masked tokens of all parts."""

    terms = (*JointStage.terms, *PART_TERMS)


class DecoderSftStage(_OnInteractions, DecoderStage):
    """Stage 'decoder-sft': the decoder alone on interactions, under a memory that says nothing."""

    terms = (*DecoderStage.terms, *PART_TERMS)
