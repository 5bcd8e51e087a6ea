"""Masked-token training of the encoder alone.

It comes before a decoder that is trained alone: that one takes the embedding learnt here, and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import MlmConfig
from rxt_dist.data.loader import TokenBatch
from rxt_dist.data.masking import IGNORED_LABEL, mask_for_mlm
from rxt_dist.data.row_source import RowSource
from rxt_dist.losses import StageOutput
from rxt_dist.model.attention import Documents
from rxt_dist.model.flops import flops_by_part
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.base import Stage, Term, Work, tensors_to


@dataclass(frozen=True)
class MlmBatch:
    """One micro-batch of masked rows.

    tokens_BT: int64 ids with [MASK]; positions_BT: int64; documents: boundaries in the pack.
    masked_P: int64 indices of masked positions among the B * T; masked_targets_P: their original ids.
    samples, tokens, pairs: as in `MicroBatch`.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    masked_P: Tensor
    masked_targets_P: Tensor
    documents: Documents
    samples: tuple[int, ...]
    tokens: int
    pairs: int

    def to(self, device: torch.device) -> MlmBatch:
        """The same on a device."""
        return tensors_to(self, device)


class MlmStage(Stage):
    """Stage 'mlm': the encoder restores masked tokens of documents."""

    terms = (Term("mlm", "masked tokens", predicts=True),)

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__(model, run)
        assert isinstance(run.stage, MlmConfig)
        self.config = run.stage

    @classmethod
    def source(cls, run: RunConfig) -> RowSource:
        """See `Stage.source`."""
        return RowSource(run)

    @classmethod
    def flops(cls, run: RunConfig, work: Work) -> int:
        """See `Stage.flops`."""
        return sum(cls.flops_by_part(run, work).values())

    @classmethod
    def flops_by_part(cls, run: RunConfig, work: Work) -> dict[str, int]:
        """See `Stage.flops_by_part`."""
        return flops_by_part(run.model, work.tokens, work.pairs, int(work.counts["mlm"]), run.stage.parts())

    @classmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """See `Stage.expected_work`."""
        assert isinstance(run.stage, MlmConfig)
        return Work(tokens, tokens * seq_len, {"mlm": round(tokens * run.stage.mlm_probability)})

    def weights(self) -> Tensor:
        """float32 [terms]."""
        return torch.ones(1)

    def prepare(self, batch: TokenBatch, trained_tokens: int | None) -> MlmBatch:
        """Mask the rows, in training and evaluation alike: restoring them is the task."""
        rows = batch.unpack()
        masked_BT, labels_BT = mask_for_mlm(rows.tokens_BT, batch.samples_B, self.run.seed, self.config.mlm_probability)
        chosen_P = (labels_BT != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        return MlmBatch(
            tokens_BT=masked_BT,
            positions_BT=rows.positions_BT,
            masked_P=chosen_P,
            masked_targets_P=labels_BT.flatten()[chosen_P],
            documents=Documents(batch.cu_seqlens, tuple(batch.cu_seqlens.diff().tolist())),
            samples=tuple(batch.samples_B.tolist()),
            tokens=batch.real_tokens,
            pairs=batch.pairs,
        )

    def counts(self, micro: MlmBatch) -> Tensor:
        """float64 [terms]: masked positions."""
        return torch.tensor([micro.masked_P.numel()], dtype=torch.float64)

    def forward(self, micro: MlmBatch, load_ME: Tensor) -> StageOutput:
        """The loss of one micro-batch; nothing is routed."""
        model = self.model
        assert model.embedding is not None
        assert model.encoder is not None
        assert model.mlm_head is not None
        encoded_LBTD = model.encoder(model.embedding(micro.tokens_BT), micro.positions_BT, micro.documents)
        masked_PD = encoded_LBTD[-1].flatten(0, 1).index_select(0, micro.masked_P)
        mlm = model.mlm_head(masked_PD, micro.masked_targets_P, self.run.train.logit_chunk_tokens)
        return StageOutput(
            sums_J=mlm.loss.reshape(1),
            hits_J=mlm.correct.reshape(1),
            expert_counts_ME=torch.zeros_like(load_ME, dtype=torch.int64),
        )
