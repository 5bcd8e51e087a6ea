"""Joint pre-training with cheated context: encoder and decoder learn from the same documents at once.

The encoder reads ids of which some are masked and is trained to restore them. Its layer outputs, detached, partly
zeroed and noised, are the memory that the decoder reads while it predicts the same documents' next tokens. No gradient
flows from decoder to encoder except through the shared embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import JointConfig
from rxt_dist.data.loader import TokenBatch, TokenRows
from rxt_dist.data.masking import IGNORED_LABEL, mask_for_mlm, sample_seed
from rxt_dist.data.row_source import RowSource
from rxt_dist.losses import StageOutput, mean_over_layers
from rxt_dist.model.attention import Documents
from rxt_dist.model.fused import Chain
from rxt_dist.model.moe import RoutingInputs
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.answers import Labels, with_parts
from rxt_dist.stages.base import Stage, Term, balance_weight, tensors_to
from rxt_dist.stages.joint_work import JointWork

MemoryKind = Literal["true", "zero", "foreign"]
MEMORIES: tuple[MemoryKind, ...] = ("true", "zero", "foreign")


@dataclass(frozen=True)
class JointBatch:
    """One micro-batch of joint pre-training.

    tokens_BT, encoder_tokens_BT: int64 ids, clean and with [MASK].
    labels_BT, parts_BT: as in `Labels`.
    masked_P: int64 indices of masked positions among the B * T; masked_targets_P: their original ids.
    positions_BT: int64; valid_N: bool, False on padding; documents: boundaries in the pack.
    samples: global positions of the rows, the keys of their noise.
    noise, masking: levels of this step; 0 in evaluation. memory: which memory the decoder reads.
    targets, part_targets: as in `Labels`; tokens, pairs: as in `MicroBatch`.
    """

    tokens_BT: Tensor
    encoder_tokens_BT: Tensor
    labels_BT: Tensor
    parts_BT: Tensor | None
    masked_P: Tensor
    masked_targets_P: Tensor
    positions_BT: Tensor
    valid_N: Tensor
    documents: Documents
    samples: tuple[int, ...]
    noise: float
    masking: float
    targets: int
    part_targets: tuple[int, ...]
    tokens: int
    pairs: int
    memory: MemoryKind = "true"

    def to(self, device: torch.device) -> JointBatch:
        """The same on a device."""
        return tensors_to(self, device)

    def with_memory(self, memory: MemoryKind) -> JointBatch:
        """The same rows read with another memory (evaluation)."""
        return replace(self, memory=memory)


class JointStage(JointWork, Stage):
    """Stage 'joint': masked-token loss of the encoder plus next-token loss of the decoder."""

    terms: tuple[Term, ...] = (
        Term("ar", "next tokens", predicts=True, by_view=True),
        Term("mlm", "masked tokens", predicts=True),
        Term("balance"),
        Term("z"),
    )
    # In pairs, so that a row has another one's memory to read.
    rows_together = 2

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__(model, run)
        assert isinstance(run.stage, JointConfig)
        self.config = run.stage
        self.seed = run.seed
        self.chunk_tokens = run.train.logit_chunk_tokens

    @classmethod
    def source(cls, run: RunConfig) -> RowSource:
        """See `Stage.source`."""
        return RowSource(run)

    def weights(self) -> Tensor:
        """float32 [terms]."""
        weights = self.config.weights
        balance = balance_weight(self.run, weights.balance)
        return self.weights_of_first(weights.ar, weights.mlm, balance, weights.z)

    def prepare(self, batch: TokenBatch, trained_tokens: int | None) -> JointBatch:
        """Mask the encoder's input and fix the levels of noise and masking after `trained_tokens` tokens.

        In evaluation (None) the memory is neither noised nor masked; the encoder's input still is, since restoring it
        is the task that the MLM figures measure. All of this is host work, so that no step waits for a device to tell
        how many positions were masked.
        """
        rows = batch.unpack()
        masked_BT, mlm_labels_BT = mask_for_mlm(rows.tokens_BT, batch.samples_B, self.seed, self.config.mlm_probability)
        chosen_P = (mlm_labels_BT != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        labels = self.labels(rows)
        levels = {"noise": 0.0, "masking": 0.0} if trained_tokens is None else self.levels(trained_tokens)
        return JointBatch(
            tokens_BT=rows.tokens_BT,
            encoder_tokens_BT=masked_BT,
            labels_BT=labels.labels_BT,
            parts_BT=labels.parts_BT,
            masked_P=chosen_P,
            masked_targets_P=mlm_labels_BT.flatten()[chosen_P],
            positions_BT=rows.positions_BT,
            valid_N=(rows.segments_BT >= 0).flatten(),
            documents=Documents(batch.cu_seqlens, tuple(batch.cu_seqlens.diff().tolist())),
            samples=tuple(batch.samples_B.tolist()),
            noise=levels["noise"],
            masking=levels["masking"],
            targets=labels.targets,
            part_targets=labels.part_targets,
            tokens=batch.real_tokens,
            pairs=batch.pairs,
        )

    def labels(self, rows: TokenRows) -> Labels:
        """What the decoder predicts."""
        return Labels(rows.next_tokens())

    def levels(self, trained_tokens: int) -> dict[str, float]:
        """Noise and masking of the memory."""
        return {
            "noise": self.config.memory_noise.at(trained_tokens),
            "masking": self.config.memory_masking.at(trained_tokens),
        }

    def views(self, micro: JointBatch) -> Mapping[str, JointBatch]:
        """The joint loss is cheated by design: the decoder reads the very document that it predicts. Only three
        memories together say what was learnt: the true one (the task as trained, without noise), none (a language model
        on its own), and another row's (how much a wrong memory harms)."""
        return {memory: micro.with_memory(memory) for memory in MEMORIES}

    def counts(self, micro: JointBatch) -> Tensor:
        """float64 [terms]: next-token targets, masked positions, and twice the tokens that are not padding; targets of
        each part."""
        counts = (micro.targets, micro.masked_P.numel(), micro.tokens, micro.tokens, *micro.part_targets)
        return torch.tensor(counts, dtype=torch.float64)

    def forward(self, micro: JointBatch, load_ME: Tensor) -> StageOutput:
        """Loss terms of one micro-batch; `load_ME` as in `RoutingInputs`."""
        model = self.model
        assert model.embedding is not None
        assert model.encoder is not None
        assert model.mlm_head is not None
        assert model.decoder is not None
        assert model.lm_head is not None
        encoded_LBTD = model.encoder(model.embedding(micro.encoder_tokens_BT), micro.positions_BT, micro.documents)
        masked_PD = encoded_LBTD[-1].flatten(0, 1).index_select(0, micro.masked_P)
        mlm = model.mlm_head(masked_PD, micro.masked_targets_P, self.chunk_tokens)
        decoded = model.decoder(
            model.embedding(micro.tokens_BT),
            micro.positions_BT,
            self._memory(encoded_LBTD.detach(), micro),
            documents=micro.documents,
            memory_documents=micro.documents,
            routing=RoutingInputs(micro.valid_N, load_ME),
        )
        ar = model.lm_head(decoded.hidden_BTD, micro.labels_BT, self.chunk_tokens)
        assert decoded.routing is not None
        balance, z = mean_over_layers(decoded.routing)
        nothing = torch.zeros_like(ar.correct)
        output = StageOutput(
            sums_J=torch.stack([ar.loss, mlm.loss, balance, z]),
            hits_J=torch.stack([ar.correct, mlm.correct, nothing, nothing]),
            expert_counts_ME=decoded.routing.counts_ME,
        )
        return with_parts(output, ar, micro.parts_BT)

    def _memory(self, encoded_LBTD: Tensor, micro: JointBatch) -> Tensor:
        if micro.memory == "zero":
            return torch.zeros_like(encoded_LBTD)
        if micro.memory == "foreign":
            if len(micro.samples) % 2:
                raise ValueError(f"rows change memories in pairs, but the micro-batch has {len(micro.samples)} rows")
            # In pairs, so that the partner does not depend on how rows were split into micro-batches.
            return encoded_LBTD.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        if micro.noise == 0 and micro.masking == 0:
            return encoded_LBTD
        return cheated_context(encoded_LBTD, micro.samples, self.seed, micro.noise, micro.masking)


def cheated_context(encoded_LBTD: Tensor, samples: Sequence[int], seed: int, noise: float, masking: float) -> Tensor:
    """ED * keep + noise * N(0, 1); keep is Bernoulli(1 - masking) per layer, sample and position, without rescaling.

    Each sample draws from a generator of its own, seeded by (seed, stage, sample): the same noise on any rank, in any
    micro-batch and after any resume. CPU and CUDA generators differ from each other.
    """
    layers, _, tokens, dim = encoded_LBTD.shape
    device = encoded_LBTD.device
    generator = torch.Generator(device)
    # As tensors, since a compiled function is made anew for another number.
    levels = [torch.full((), level, dtype=torch.float32, device=device) for level in (noise, masking)]
    rows = []
    for row, sample in enumerate(samples):
        generator.manual_seed(sample_seed(seed, "joint", "memory", sample))
        drawn_LTD = torch.randn(layers, tokens, dim, generator=generator, device=device)
        chance_LT1 = torch.rand(layers, tokens, 1, generator=generator, device=device)
        rows.append(_cheated(encoded_LBTD[:, row], drawn_LTD, chance_LT1, *levels))
    return torch.stack(rows, dim=1)


def _cheated_row(encoded_LTD: Tensor, drawn_LTD: Tensor, chance_LT1: Tensor, noise: Tensor, masking: Tensor) -> Tensor:
    return encoded_LTD * (chance_LT1 >= masking) + (drawn_LTD * noise).to(encoded_LTD.dtype)


_cheated = Chain(_cheated_row)
