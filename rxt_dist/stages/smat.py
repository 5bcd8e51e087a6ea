"""Supervised memory-aware training: the system answers turn by turn, with what it has written so far as its memory.

Each turn is decoded under the memory of the turns before it, whose writes gradients pass through. A turn is written
when there is another one to read it, so the last one never is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import SmatConfig
from rxt_dist.data.dialogue_source import DialogueSource, TurnBatch
from rxt_dist.losses import StageOutput, mean_over_layers, sums_by
from rxt_dist.model.flops import flops_by_part
from rxt_dist.model.moe import RoutingInputs
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.answers import PART_TERMS, counts_by_part
from rxt_dist.stages.base import Stage, Term, Work, balance_weight, tensors_to
from rxt_dist.stages.dialogue import gate_terms, keyed_normal, memory_attention_flops, write_turn
from rxt_dist.stages.turns import TurnRows, rows_of

MemoryKind = Literal["true", "fresh", "zero", "foreign"]
MEMORIES: tuple[MemoryKind, ...] = ("true", "fresh", "zero", "foreign")

# How many turns may lie between telling and asking, for each of which there is a figure.
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16)
_TERMS = (
    Term("ar", "answers", predicts=True, by_view=True),
    Term("balance"),
    Term("z"),
    Term("rms", "rms of the memory", by_view=True),
    Term("change", "rms of a write's change", by_view=True),
    Term("recall", "recalled values", predicts=True, by_view=True),
)


@dataclass(frozen=True)
class SmatBatch:
    """One micro-batch of B dialogues, the longest first.

    rows: of all turns, see `TurnRows`; counts: how much each term counts.
    cut_UB: bool, whether a dialogue's memory loses its history before what turn u reads is written; None: never.
    trains_memory, trains_encoder: whether gradients reach memory attention, and the encoder.
    memory: what the decoder reads.
    samples, tokens, pairs: as in `MicroBatch`.
    """

    rows: TurnRows
    counts: tuple[float, ...]
    cut_UB: Tensor | None
    trains_memory: bool
    trains_encoder: bool
    samples: tuple[int, ...]
    tokens: int
    pairs: int
    memory: MemoryKind = "true"

    def to(self, device: torch.device) -> SmatBatch:
        """The same on a device."""
        return replace(tensors_to(self, device), rows=tensors_to(self.rows, device))


class Decoded(NamedTuple):
    """Sums over some turns: loss (differentiable), loss and hit of each label, router terms, choices of experts, rms of
    the memories that were read, rms of what writes changed, gates of the layers that wrote it."""

    loss: Tensor
    losses_P: Tensor
    hits_P: Tensor
    balance: Tensor
    z: Tensor
    counts_ME: Tensor
    rms: Tensor
    change: Tensor
    gates_L: Tensor


class SmatStage(Stage):
    """Stage 'smat': decoder, memory attention and encoder, on dialogues."""

    # In pairs, so that a dialogue has another one's memory to read.
    rows_together = 2

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__(model, run)
        assert isinstance(run.stage, SmatConfig)
        self.config = run.stage
        self.distances = tuple(distance for distance in DISTANCES if distance < self.config.turns)
        turns = [f"turn-{turn + 1}" for turn in range(self.config.turns)]
        recalls = [f"recall-{distance}" for distance in self.distances]
        details = tuple(Term(name, name, True, True, detail=True) for name in (*turns, *recalls))
        self.gates = gate_terms(run.model)
        self.terms = (*_TERMS, *details, *PART_TERMS, *self.gates)

    @classmethod
    def source(cls, run: RunConfig) -> DialogueSource:
        """See `Stage.source`."""
        assert isinstance(run.stage, SmatConfig)
        return DialogueSource(run, run.stage.turns)

    @classmethod
    def flops(cls, run: RunConfig, work: Work) -> int:
        """See `Stage.flops`."""
        return sum(cls.flops_by_part(run, work).values())

    @classmethod
    def flops_by_part(cls, run: RunConfig, work: Work) -> dict[str, int]:
        """See `Stage.flops_by_part`. What is written is taken to be as long as the other turns, and frozen weights are
        counted as the others."""
        model, counts, parts = run.model, work.counts, run.stage.parts()
        share = counts["change"] / max(1.0, counts["rms"])
        read = round(counts["balance"])
        found = flops_by_part(model, read, work.pairs, 0, parts, read * model.stm_slots)
        head = flops_by_part(model, round(counts["ar"]), 0, 0, parts)["lm_head"]
        encoder = round(share * flops_by_part(model, work.tokens, work.pairs, 0, parts)["encoder"])
        written = memory_attention_flops(model, counts["change"], share * work.tokens)
        return found | {"lm_head": head, "encoder": encoder, "memory_attention": written}

    @classmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """See `Stage.expected_work`: every turn as long as it may be, and all of it answer."""
        assert isinstance(run.stage, SmatConfig)
        turns = tokens / seq_len
        writes = turns * (run.stage.turns - 1) / run.stage.turns
        counts = {"ar": float(tokens), "balance": float(tokens), "rms": turns, "change": writes}
        return Work(tokens, tokens * seq_len, counts)

    def weights(self) -> Tensor:
        """float32 [terms]: what comes after the third is told, not trained."""
        weights = self.config.weights
        return self.weights_of_first(1.0, balance_weight(self.run, weights.balance), weights.z)

    def rates(self, trained_tokens: int) -> dict[str, float]:
        """See `Stage.rates`: what is freed later begins with a warm-up of its own."""
        config = self.config
        return {
            "decoder": 1.0,
            "memory": self._rate(config.memory_after, trained_tokens),
            "encoder": self._rate(config.encoder_after, trained_tokens),
        }

    def _rate(self, after: int, trained_tokens: int) -> float:
        if trained_tokens < after:
            return 0.0
        if not after or not self.config.warmup_tokens:
            return 1.0
        end = trained_tokens - after + self.run.train.global_batch_tokens
        return min(1.0, end / self.config.warmup_tokens)

    def prepare(self, batch: TurnBatch, trained_tokens: int | None) -> SmatBatch:
        """See `Stage.prepare`; training and evaluation see the same."""
        rows, order_B = rows_of(batch, self.config.train_mode, self.distances)
        cut_UB = None
        if self.config.depth is not None:
            turn_UB = torch.arange(len(rows.turns)).unsqueeze(1) - rows.system_B.long()
            cut_UB = turn_UB % self.config.depth == 0
        rates = self.rates(0 if trained_tokens is None else trained_tokens)
        turns_J = torch.bincount(rows.turn_P, minlength=self.config.turns)
        recalls_J = torch.bincount(rows.distance_N, minlength=len(self.distances) + 1)[: len(self.distances)]
        parts, gates = counts_by_part(rows.part_P), [rows.writes] * len(self.gates)
        told = [rows.labels, rows.read_tokens, rows.read_tokens, rows.reads, rows.writes, len(rows.distance_N)]
        return SmatBatch(
            rows=rows,
            counts=tuple(map(float, [*told, *turns_J.tolist(), *recalls_J.tolist(), *parts, *gates])),
            cut_UB=cut_UB,
            trains_memory=rates["memory"] > 0,
            trains_encoder=rates["encoder"] > 0,
            samples=tuple(batch.samples_B[order_B].tolist()),
            tokens=batch.real_tokens,
            pairs=batch.pairs,
        )

    def views(self, micro: SmatBatch) -> Mapping[str, SmatBatch]:
        """What the memory is worth: the one that was written, the one that all dialogues begin with, none, and what
        another dialogue has written until the same turn.

        Raises:
            ValueError: dialogues without a neighbour.
        """
        if len(micro.samples) % 2:
            raise ValueError(f"dialogues change memories in pairs, but the micro-batch has {len(micro.samples)}")
        return {memory: replace(micro, memory=memory) for memory in MEMORIES}

    def counts(self, micro: SmatBatch) -> Tensor:
        """float64 [terms]: labels, tokens of what is read (twice), turns read and written, values asked for; labels of
        each turn; values of each distance; labels of each part of answers; turns written by each layer."""
        counts_J = torch.tensor(micro.counts, dtype=torch.float64)
        if micro.memory in ("fresh", "zero"):
            counts_J[[term.name == "change" or term in self.gates for term in self.terms]] = 0
        return counts_J

    def forward(self, micro: SmatBatch, load_ME: Tensor) -> StageOutput:
        """Loss terms of one micro-batch; `load_ME` as in `RoutingInputs`."""
        memory_LBSD = self.first_memory(micro, load_ME.device)
        turns, parts = len(micro.rows.turns), []
        if not self.config.recompute_turns:
            parts.append(self._turns(memory_LBSD, micro, load_ME, 0, turns)[1])
            turns = 0
        for turn in range(turns):
            arguments = (memory_LBSD, micro, load_ME, turn, turn + 1)
            if torch.is_grad_enabled():
                memory_LBSD, part = checkpoint(self._turns, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                memory_LBSD, part = self._turns(*arguments)
            parts.append(part)
        return self._output(micro.rows, parts)

    def first_memory(self, micro: SmatBatch, device: torch.device) -> Tensor:
        """The memory that each dialogue begins with, float32 [L, B, S, D]."""
        model = self.run.model
        shape = model.layers, model.stm_slots, model.dim
        if micro.memory == "zero":
            return torch.zeros(shape[0], len(micro.samples), *shape[1:], device=device)
        drawn = [keyed_normal(self.run.seed, "smat", "memory", sample, shape, device) for sample in micro.samples]
        return torch.stack(drawn, dim=1)

    def _turns(
        self, memory_LBSD: Tensor, micro: SmatBatch, load_ME: Tensor, first: int, end: int
    ) -> tuple[Tensor, Decoded]:
        """Turns [first, end) at once: what they read is written, one after another, and then they are decoded.

        Returns:
            the memory that the last of them read, [L, B, S, D]; sums over them.
        """
        rows, read = micro.rows, []
        written = range(max(1, first), end) if micro.memory in ("true", "foreign") else range(0)
        encoded_LRTD = self._encoded(micro, written) if written else None
        change, gates_L = memory_LBSD.new_zeros(()), memory_LBSD.new_zeros(len(memory_LBSD))
        for turn in range(first, end):
            if encoded_LRTD is not None and turn in written:
                memory_LBSD, *told = self._written(memory_LBSD, encoded_LRTD, micro, turn, written.start)
                change, gates_L = change + told[0], gates_L + told[1]
            here = rows.reads_of(turn, turn + 1)
            readers_R = (rows.others_R if micro.memory == "foreign" else rows.readers_R)[here]
            read.append(memory_LBSD.index_select(1, readers_R))
        memory_LRSD = torch.cat(read, dim=1) if len(read) > 1 else read[0]
        decoded = self._decoded(memory_LRSD, rows, load_ME, first, end)
        return memory_LBSD, decoded._replace(change=change, gates_L=gates_L)

    def _encoded(self, micro: SmatBatch, turns: range) -> Tensor:
        """[L, R, T, D]: what is written before these turns read, row by row."""
        model, rows = self.model, micro.rows
        assert model.embedding is not None
        assert model.encoder is not None
        here = rows.writes_of(turns.start, turns.stop)
        keys_RT = rows.written_keys_RT[here]
        positions_RT = _positions(keys_RT)
        with torch.set_grad_enabled(micro.trains_encoder and torch.is_grad_enabled()):
            encoded: Tensor = model.encoder(model.embedding(rows.written_RT[here]), positions_RT, keys_BT=keys_RT)
        return encoded

    def _written(
        self, memory_LBSD: Tensor, encoded_LRTD: Tensor, micro: SmatBatch, turn: int, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The memory that a turn reads, and sums over dialogues: of the rms by which the write changed it, and of the
        gates [L].

        Dialogues that have ended keep theirs. One is written in any case, as other ranks may have some to write.

        Args:
            first: the turn before which the first of the encoded rows is written.
        """
        rows = micro.rows
        here = rows.writes_of(turn, turn + 1)
        at, count, living = here.start - rows.writes_of(first, turn).start, here.stop - here.start, rows.living(turn)
        if micro.cut_UB is not None:
            cut_B = micro.cut_UB[turn].view(1, -1, 1, 1)
            memory_LBSD = torch.where(cut_B, memory_LBSD.detach(), memory_LBSD)
        with torch.set_grad_enabled(micro.trains_memory and torch.is_grad_enabled()):
            encoded_LBTD = encoded_LRTD[:, at : at + count]
            new_LBSD, gates_LB = write_turn(
                self.model, memory_LBSD[:, :count], encoded_LBTD, rows.written_keys_RT[here]
            )
        new_LBSD = new_LBSD[:, :living]
        change_B = (new_LBSD.detach() - memory_LBSD[:, :living].detach()).square().mean((0, 2, 3)).sqrt()
        if living < memory_LBSD.shape[1]:
            new_LBSD = torch.cat([new_LBSD, memory_LBSD[:, living:]], dim=1)
        return new_LBSD, change_B.sum(), gates_LB[:, :living].sum(1)

    def _decoded(self, memory_LRSD: Tensor, rows: TurnRows, load_ME: Tensor, first: int, end: int) -> Decoded:
        """Turns [first, end) under the memory of each of their rows, [L, R, S, D]."""
        model = self.model
        assert model.embedding is not None
        assert model.decoder is not None
        assert model.lm_head is not None
        here, labels = rows.reads_of(first, end), rows.labels_of(first, end)
        tokens_RT, valid_RT = rows.tokens_RT[here], rows.valid_RT[here]
        embedded_RTD = model.embedding(tokens_RT)
        decoded = model.decoder(
            embedded_RTD,
            _positions(tokens_RT),
            memory_LRSD.to(embedded_RTD.dtype),
            routing=RoutingInputs(valid_RT.flatten(), load_ME),
        )
        # Only what has a label is looked at by the head.
        labelled_P = rows.labelled_P[labels] - here.start * tokens_RT.shape[1]
        hidden_PD = decoded.hidden_BTD.flatten(0, 1).index_select(0, labelled_P)
        ar = model.lm_head(hidden_PD, rows.targets_P[labels], self.run.train.logit_chunk_tokens)
        assert decoded.routing is not None
        balance, z = mean_over_layers(decoded.routing)
        counts_ME = decoded.routing.counts_ME
        rms_R = memory_LRSD.detach().square().mean((0, 2, 3)).sqrt()
        rms = torch.where(valid_RT[:, 0], rms_R, 0.0).sum()
        # What is written is told by who writes it.
        nothing = rms.new_zeros(())
        return Decoded(ar.loss, ar.losses_N, ar.hits_N, balance, z, counts_ME, rms, nothing, nothing)

    def _output(self, rows: TurnRows, parts: Sequence[Decoded]) -> StageOutput:
        """The terms, from the sums over all turns."""
        # What is there for each label stands one turn after another; all else is added.
        found = {name: [getattr(part, name) for part in parts] for name in Decoded._fields}
        sums = Decoded(
            **{
                name: torch.cat(each) if name.endswith("_P") else torch.stack(each).sum(0)
                for name, each in found.items()
            }
        )
        lost_N = sums.losses_P.index_select(0, rows.value_N)
        missed_N = sums.hits_P.logical_not().index_select(0, rows.value_N)
        lost_each_N, missed_each_N = sums_by(rows.ask_N, len(rows.distance_N), lost_N, missed_N)
        # Recalled is what is right in all its tokens.
        recalled_N = missed_each_N == 0
        groups = (
            sums_by(rows.turn_P, self.config.turns, sums.losses_P, sums.hits_P),
            sums_by(rows.distance_N, len(self.distances), lost_each_N, recalled_N),
            sums_by(rows.part_P, len(PART_TERMS), sums.losses_P, sums.hits_P),
        )
        top = [sums.loss, sums.balance, sums.z, sums.rms, sums.change, lost_each_N.sum()]
        nothing = torch.zeros_like(recalled_N.sum())
        hits = [sums.hits_P.sum(), *[nothing] * 4, recalled_N.sum()]
        return StageOutput(
            sums_J=torch.cat([torch.stack(top), *(each for each, _ in groups), sums.gates_L[: len(self.gates)]]),
            hits_J=torch.cat([torch.stack(hits), *(each for _, each in groups), nothing.expand(len(self.gates))]),
            expert_counts_ME=sums.counts_ME,
        )


def _positions(rows_RT: Tensor) -> Tensor:
    return torch.arange(rows_RT.shape[1], device=rows_RT.device).expand_as(rows_RT)
