"""Next-token training of the decoder alone.

It reads a memory that says nothing: one fixed random tensor for all rows, or none at all. What reads the memory stays
as it is, and so does the embedding, which another stage has trained. Memory attention comes later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import DecoderStageConfig
from rxt_dist.data.loader import TokenBatch, TokenRows
from rxt_dist.data.masking import sample_seed
from rxt_dist.data.row_source import RowSource
from rxt_dist.losses import StageOutput, mean_over_layers
from rxt_dist.model.attention import Documents
from rxt_dist.model.flops import flops_by_part
from rxt_dist.model.moe import RoutingInputs
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.answers import Labels, with_parts
from rxt_dist.stages.base import Stage, Term, Work, balance_weight, tensors_to, to_device

MemoryKind = Literal["fixed", "fresh", "off"]
MEMORIES: tuple[MemoryKind, ...] = ("fixed", "fresh", "off")


@dataclass(frozen=True)
class DecoderBatch:
    """One micro-batch of a decoder alone.

    tokens_BT, positions_BT: int64; labels_BT, parts_BT, targets, part_targets: as in `Labels`.
    valid_N: bool, False on padding; documents: boundaries in the pack.
    samples, tokens, pairs: as in `MicroBatch`. memory: what the decoder reads.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    labels_BT: Tensor
    parts_BT: Tensor | None
    valid_N: Tensor
    documents: Documents
    samples: tuple[int, ...]
    targets: int
    part_targets: tuple[int, ...]
    tokens: int
    pairs: int
    memory: MemoryKind

    def to(self, device: torch.device) -> DecoderBatch:
        """The same on a device."""
        return tensors_to(self, device)


class DecoderStage(Stage):
    """Stage 'decoder': next tokens of documents, under a memory that says nothing."""

    terms: tuple[Term, ...] = (Term("ar", "next tokens", predicts=True, by_view=True), Term("balance"), Term("z"))

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__(model, run)
        assert isinstance(run.stage, DecoderStageConfig)
        self.config = run.stage
        # By what is read, device and type: made once, so that no step waits for a copy.
        self._memories: dict[tuple[MemoryKind, torch.device, torch.dtype], Tensor] = {}

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
        """See `Stage.flops_by_part`; frozen weights are counted as the others."""
        assert isinstance(run.stage, DecoderStageConfig)
        slots = work.tokens * run.model.stm_slots
        found = flops_by_part(run.model, work.tokens, work.pairs, 0, run.stage.parts(), slots)
        return found | {"cross_attention": 0} if run.stage.memory == "off" else found

    @classmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """See `Stage.expected_work`."""
        return Work(tokens, tokens * seq_len, {})

    def weights(self) -> Tensor:
        """float32 [terms]."""
        weights = self.config.weights
        return self.weights_of_first(1.0, balance_weight(self.run, weights.balance), weights.z)

    def labels(self, rows: TokenRows) -> Labels:
        """What the decoder predicts."""
        return Labels(rows.next_tokens())

    def prepare(self, batch: TokenBatch, trained_tokens: int | None) -> DecoderBatch:
        """See `Stage.prepare`; training and evaluation see the same."""
        rows = batch.unpack()
        labels = self.labels(rows)
        return DecoderBatch(
            tokens_BT=rows.tokens_BT,
            positions_BT=rows.positions_BT,
            labels_BT=labels.labels_BT,
            parts_BT=labels.parts_BT,
            valid_N=(rows.segments_BT >= 0).flatten(),
            documents=Documents(batch.cu_seqlens, tuple(batch.cu_seqlens.diff().tolist())),
            samples=tuple(batch.samples_B.tolist()),
            targets=labels.targets,
            part_targets=labels.part_targets,
            tokens=batch.real_tokens,
            pairs=batch.pairs,
            memory=self.config.memory,
        )

    def views(self, micro: DecoderBatch) -> Mapping[str, DecoderBatch]:
        """A decoder that learnt nothing from its memory is as good with the fixed one, with another one (`fresh`,
        N(0, 1)) and with none."""
        if self.config.memory == "off":
            return {"off": micro}
        return {memory: replace(micro, memory=memory) for memory in MEMORIES}

    def counts(self, micro: DecoderBatch) -> Tensor:
        """float64 [terms]: targets, and twice the tokens that are not padding; targets of each part."""
        counts = (micro.targets, micro.tokens, micro.tokens, *micro.part_targets)
        return torch.tensor(counts, dtype=torch.float64)

    def forward(self, micro: DecoderBatch, load_ME: Tensor) -> StageOutput:
        """Loss terms of one micro-batch; `load_ME` as in `RoutingInputs`."""
        model = self.model
        assert model.embedding is not None
        assert model.decoder is not None
        assert model.lm_head is not None
        embedded_BTD = model.embedding(micro.tokens_BT)
        decoded = model.decoder(
            embedded_BTD,
            micro.positions_BT,
            self._memory(micro.memory, embedded_BTD),
            documents=micro.documents,
            routing=RoutingInputs(micro.valid_N, load_ME),
        )
        ar = model.lm_head(decoded.hidden_BTD, micro.labels_BT, self.run.train.logit_chunk_tokens)
        assert decoded.routing is not None
        balance, z = mean_over_layers(decoded.routing)
        nothing = torch.zeros_like(ar.correct)
        output = StageOutput(
            sums_J=torch.stack([ar.loss, balance, z]),
            hits_J=torch.stack([ar.correct, nothing, nothing]),
            expert_counts_ME=decoded.routing.counts_ME,
        )
        return with_parts(output, ar, micro.parts_BT)

    def _memory(self, kind: MemoryKind, like: Tensor) -> Tensor | None:
        """[L, 1, S, D], one for all rows; None: cross-attention is passed over."""
        if kind == "off":
            return None
        key = kind, like.device, like.dtype
        if key not in self._memories:
            deviation = self.config.memory_deviation if kind == "fixed" else 1.0
            memory = deviation * constant_memory(self.run, kind)
            self._memories[key] = to_device(memory.to(like.dtype), like.device)
        return self._memories[key]


def constant_memory(run: RunConfig, kind: MemoryKind) -> Tensor:
    """float32 [L, 1, S, D] of N(0, 1), the same in every run and on every device: a stage that goes on from another
    one finds the memory that its decoder is used to."""
    generator = torch.Generator().manual_seed(sample_seed(0, "decoder", kind, 0))
    model = run.model
    return torch.randn(model.layers, 1, model.stm_slots, model.dim, generator=generator)
