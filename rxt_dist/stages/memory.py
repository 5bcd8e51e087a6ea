"""Pre-training of memory attention: it learns to mix what it remembers with what it reads.

Turn by turn the frozen encoder reads a dialogue and memory attention writes it. The label is a weighted sum of the old
memory and the encoded turn, of which the first turn takes the most; the loss is the cosine between label and new
memory. No gradient flows from one turn to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import MemoryStageConfig
from rxt_dist.data.dialogue_source import DialogueSource, TurnBatch
from rxt_dist.data.masking import keyed_uniform
from rxt_dist.losses import StageOutput
from rxt_dist.model.flops import flops_by_part
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.base import Stage, Term, Work, tensors_to
from rxt_dist.stages.dialogue import gate_terms, keyed_normal, memory_attention_flops, write_turn

_FIRST_SHARE, _SHARE, _SHARE_STEP, _JITTER = 0.9, 0.5, 0.05, 0.15
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class MemoryBatch:
    """One micro-batch of B dialogues of U turns of T tokens, the longest first.

    tokens_BUT: int64; keys_BUT: bool, False on padding, but for the first token of a turn that is not there, so that
    attention always finds a key. living_U: how many dialogues, the first ones, have each turn.
    slots_BUS: int64, the token whose encoding is the label of each memory slot.
    shares_BU: float32, the share of the turn in the label.
    lengths: turns' tokens on the host. counted: the turns that count, all or one. noisy: in training.
    samples, tokens, pairs: as in `MicroBatch`.
    """

    tokens_BUT: Tensor
    keys_BUT: Tensor
    slots_BUS: Tensor
    shares_BU: Tensor
    lengths: tuple[tuple[int, ...], ...]
    living_U: tuple[int, ...]
    counted: tuple[int, ...]
    noisy: bool
    samples: tuple[int, ...]
    tokens: int
    pairs: int

    def to(self, device: torch.device) -> MemoryBatch:
        """The same on a device."""
        return tensors_to(self, device)


class Written(NamedTuple):
    """What one write of each dialogue comes to, float32 [B]: minus the mean cosine of new memory and label, the mean
    square of the change, and the root mean square of the new memory."""

    distance_B: Tensor
    change_B: Tensor
    rms_B: Tensor


_TERMS = (
    Term("memory", "memory", by_view=True),
    Term("change", "squared change of the memory", by_view=True),
    Term("rms", "rms of the memory", by_view=True),
)


class MemoryStage(Stage):
    """Stage 'memory': memory attention alone, on dialogues."""

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__(model, run)
        assert isinstance(run.stage, MemoryStageConfig)
        self.config = run.stage
        self.gates = gate_terms(run.model)
        self.terms = (*_TERMS, *self.gates)

    @classmethod
    def source(cls, run: RunConfig) -> DialogueSource:
        """See `Stage.source`."""
        assert isinstance(run.stage, MemoryStageConfig)
        return DialogueSource(run, run.stage.turns)

    @classmethod
    def flops(cls, run: RunConfig, work: Work) -> int:
        """See `Stage.flops`."""
        return sum(cls.flops_by_part(run, work).values())

    @classmethod
    def flops_by_part(cls, run: RunConfig, work: Work) -> dict[str, int]:
        """See `Stage.flops_by_part`: the encoder forwards only; a write's weights meet each slot of the memory."""
        encoder = flops_by_part(run.model, work.tokens, work.pairs, 0, run.stage.parts())["encoder"]
        written = memory_attention_flops(run.model, work.counts["memory"], work.tokens)
        return {"encoder": encoder // 3, "memory_attention": written}

    @classmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """See `Stage.expected_work`: every turn as long as it may be."""
        return Work(tokens, tokens * seq_len, {"memory": tokens / seq_len})

    def weights(self) -> Tensor:
        """float32 [terms]: the memory's rms and the gates are told, not trained."""
        return self.weights_of_first(1.0, self.config.change_weight)

    def prepare(self, batch: TurnBatch, trained_tokens: int | None) -> MemoryBatch:
        """See `Stage.prepare`. In evaluation there is no noise, and shares are not moved."""
        turns, width = batch.tokens_BUT.shape[1:]
        is_live_BU = batch.lengths_BU > 0
        order_B = is_live_BU.sum(1).argsort(descending=True, stable=True)
        lengths_BU, samples_B = batch.lengths_BU[order_B], batch.samples_B[order_B]
        lengths_BU1 = lengths_BU.unsqueeze(-1)
        slots_S = torch.arange(self.run.model.stm_slots)
        noisy = trained_tokens is not None
        return MemoryBatch(
            tokens_BUT=batch.tokens_BUT[order_B],
            keys_BUT=torch.arange(width) < lengths_BU1.clamp_min(1),
            slots_BUS=slots_S * lengths_BU1 // len(slots_S),
            shares_BU=self._shares(samples_B, turns, noisy),
            lengths=tuple(tuple(row) for row in lengths_BU.tolist()),
            living_U=tuple(is_live_BU.sum(0).tolist()),
            counted=tuple(range(turns)),
            noisy=noisy,
            samples=tuple(samples_B.tolist()),
            tokens=batch.real_tokens,
            pairs=batch.pairs,
        )

    def _shares(self, samples_B: Tensor, turns: int, moved: bool) -> Tensor:
        """float32 [B, U]: 0.9 of the first turn, then half and less, moved by up to 0.15 each."""
        shares_U = torch.tensor([_FIRST_SHARE, *(_SHARE - _SHARE_STEP * turn for turn in range(1, turns))])
        shares_BU = shares_U.expand(len(samples_B), -1)
        if moved:
            shares_BU = shares_BU + _JITTER * (2 * keyed_uniform(self.run.seed, "share", samples_B, turns) - 1)
        return shares_BU.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)

    def views(self, micro: MemoryBatch) -> Mapping[str, MemoryBatch]:
        """All turns together, and each by itself."""
        turns = {f"turn-{turn + 1}": replace(micro, counted=(turn,)) for turn in micro.counted}
        return {"all": micro, **turns}

    def counts(self, micro: MemoryBatch) -> Tensor:
        """float64 [terms]: turns of dialogues."""
        turns = sum(micro.living_U[turn] for turn in micro.counted)
        return torch.full((len(self.terms),), turns, dtype=torch.float64)

    def forward(self, micro: MemoryBatch, load_ME: Tensor) -> StageOutput:
        """Loss terms of one micro-batch; nothing is routed."""
        model = self.model
        assert model.embedding is not None
        assert model.encoder is not None
        device, turns = micro.tokens_BUT.device, micro.tokens_BUT.shape[1]
        memory_LBSD = torch.stack([self._drawn("fresh", sample, device) for sample in micro.samples], dim=1)
        positions_BT = torch.arange(micro.tokens_BUT.shape[2], device=device).expand(len(micro.samples), -1)
        sums_J = torch.zeros(len(self.terms), device=device)
        for turn in range(turns):
            # Dialogues that have ended keep their memory. One is written in any case, as other ranks may have some.
            living = micro.living_U[turn]
            here = slice(max(1, living))
            old_LBSD, keys_BT = memory_LBSD[:, here], micro.keys_BUT[here, turn]
            embedded_BTD = model.embedding(micro.tokens_BUT[here, turn])
            encoded_LBTD = model.encoder(embedded_BTD, positions_BT[here], keys_BT=keys_BT)
            noise = self._noise(micro, here, turn, encoded_LBTD) if micro.noisy else None
            noised_LBTD = encoded_LBTD if noise is None else encoded_LBTD + noise[0].to(encoded_LBTD.dtype)
            new_LBSD, gates_LB = write_turn(model, old_LBSD, noised_LBTD, keys_BT)
            label_LBSD = mixed_label(
                old_LBSD,
                encoded_LBTD.float(),
                micro.slots_BUS[here, turn],
                micro.shares_BU[here, turn],
                None if noise is None else noise[1],
                self.config.label_scale == "unit",
            )
            written = written_of(old_LBSD, new_LBSD, label_LBSD)
            if turn in micro.counted:
                growth = (turn + 1) ** 0.5
                terms_JB = torch.stack([written.distance_B, growth * written.change_B, written.rms_B.detach()])
                told_JB = torch.cat([terms_JB, gates_LB[: len(self.gates)]])
                sums_J = sums_J + told_JB[:, :living].sum(1)
            memory_LBSD = torch.cat([new_LBSD.detach()[:, :living], memory_LBSD[:, living:]], dim=1)
        nothing = torch.zeros(len(self.terms), dtype=torch.int64, device=device)
        return StageOutput(sums_J, nothing, torch.zeros_like(load_ME, dtype=torch.int64))

    def _noise(self, micro: MemoryBatch, here: slice, turn: int, encoded_LBTD: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of what some dialogues write [L, B, T, D], scaled by its rms, and of the label [L, B, S, D], by a share
        of it.

        Each is drawn for a turn's own tokens, so that it does not depend on how long other dialogues are."""
        device, width = encoded_LBTD.device, encoded_LBTD.shape[2]
        drawn, labels = [], []
        for sample, lengths in zip(micro.samples[here], micro.lengths[here], strict=True):
            own_LTD = self._drawn(f"input-{turn}", sample, device, lengths[turn])
            drawn.append(F.pad(own_LTD, (0, 0, 0, width - lengths[turn])))
            labels.append(self.config.label_noise * self._drawn(f"label-{turn}", sample, device))
        noise_LBTD = self.config.input_noise * torch.stack(drawn, dim=1) * rms(encoded_LBTD.float())
        return noise_LBTD, torch.stack(labels, dim=1)

    def _drawn(self, kind: str, sample: int, device: torch.device, length: int | None = None) -> Tensor:
        """float32 N(0, 1), [L, length, D] or one for each slot: a function of (seed, stage, kind, sample) alone."""
        model = self.run.model
        shape = model.layers, model.stm_slots if length is None else length, model.dim
        return keyed_normal(self.run.seed, "memory", kind, sample, shape, device)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square over the last axis, which stays with the size 1; of zeros a very small number."""
    return tensor.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


def mixed_label(
    old_LBSD: Tensor,
    encoded_LBTD: Tensor,
    slots_BS: Tensor,
    shares_B: Tensor,
    noise_LBSD: Tensor | None,
    unit: bool,
) -> Tensor:
    """What the new memory shall be, [L, B, S, D]: (1 - share) of the old one and `share` of the encoded turn.

    Args:
        slots_BS: the token that each slot takes.
        noise_LBSD: noise, as a share of the label's rms.
        unit: both are brought to the rms 1 before. Else a share is none, as encodings grow with depth.
    """
    index_LBSD = slots_BS[None, :, :, None].expand(len(encoded_LBTD), -1, -1, encoded_LBTD.shape[-1])
    taken_LBSD = encoded_LBTD.gather(2, index_LBSD)
    if unit:
        old_LBSD, taken_LBSD = old_LBSD / rms(old_LBSD), taken_LBSD / rms(taken_LBSD)
    share = shares_B.view(1, -1, 1, 1)
    label_LBSD = (1 - share) * old_LBSD + share * taken_LBSD
    return label_LBSD if noise_LBSD is None else label_LBSD + noise_LBSD * rms(label_LBSD)


def written_of(old_LBSD: Tensor, new_LBSD: Tensor, label_LBSD: Tensor) -> Written:
    """Means over layers, slots and (but for the cosine) width of each dialogue."""
    cosine_LBS = F.cosine_similarity(new_LBSD, label_LBSD, dim=-1)
    change_LBSD = (new_LBSD - old_LBSD).square()
    return Written(-cosine_LBS.mean((0, 2)), change_LBSD.mean((0, 2, 3)), new_LBSD.square().mean((0, 2, 3)).sqrt())
