"""Answers as ids: prompt phase, mode, and one token after another for B interactions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rxt_dist.data.interactions import ANSWER_ID, INTERNAL_ID, QUERY_ID, RESULT_ID, THINK_ID
from rxt_dist.data.rows import BOS_ID, EOS_ID, MASK_ID, PAD_ID, UNK_ID
from rxt_dist.inference.sampling import Sampling, choose
from rxt_dist.model.decoding import Decoding
from rxt_dist.model.reactive import ReactiveTransformer

_NEVER = (PAD_ID, UNK_ID, BOS_ID, MASK_ID, QUERY_ID, RESULT_ID, INTERNAL_ID)
_NOT_AFTER_ANSWER = (ANSWER_ID, THINK_ID)


@dataclass
class Row:
    """One interaction that is being answered.

    prompt: ids up to the mode. mode: the token after them; None: the model chooses between [A] and [T].
    controls: ids of the control tokens that the model's tokenizer has; others are words.
    said: mode and generated tokens so far.
    """

    prompt: Sequence[int]
    mode: int | None
    sampling: Sampling
    generator: torch.Generator
    controls: frozenset[int]
    said: list[int] = field(default_factory=list)

    @property
    def written(self) -> list[int]:
        """What the encoder reads of it: everything that the decoder read or said, and nothing else."""
        return [*self.prompt, *self.said]

    @property
    def end(self) -> int:
        """Where its last token stands."""
        return len(self.prompt) + len(self.said) - 1

    def limit(self, seq_len: int) -> int:
        """Most tokens that `said` may come to, the mode included."""
        room = seq_len - len(self.prompt)
        return room if self.sampling.max_tokens is None else min(room, 1 + self.sampling.max_tokens)

    def ended(self, seq_len: int) -> bool:
        """Whether nothing more is said."""
        return self.said[-1:] == [EOS_ID] or len(self.said) >= self.limit(seq_len)

    def choose(self, logits_V: Tensor) -> int:
        """The next token, given the logits after all that was said; the mode if nothing was."""
        if not self.said:
            if self.mode is not None:
                return self.mode
            return ANSWER_ID if logits_V[ANSWER_ID] >= logits_V[THINK_ID] else THINK_ID
        return choose(logits_V, self.sampling, self.generator, self._banned())

    def _banned(self) -> Tensor | None:
        if not self.sampling.suppress:
            return None
        answers = ANSWER_ID in self.said
        return torch.tensor(sorted(self.controls & {*_NEVER, *(_NOT_AFTER_ANSWER if answers else ())}))


@torch.no_grad()
def answer(
    network: ReactiveTransformer,
    memory_LBSD: Tensor | None,
    rows: Sequence[Row],
    watch: Callable[[int, Tensor], None] | None = None,
) -> Iterator[tuple[int | None, ...]]:
    """Answer B interactions; each step says the next token of every row, the mode first, None for a row that has ended.

    A row's tokens do not depend on the rows beside it. What was said stands in the rows.

    Args:
        memory_LBSD: of B rows, or of one for all.
        watch: told the number of a row and the logits [V] from which each of its tokens after the mode is chosen.
    """
    assert network.embedding is not None
    assert network.decoder is not None
    assert network.lm_head is not None
    seq_len, embed = network.config.seq_len, network.embedding
    longest = max(len(row.prompt) for row in rows)
    ids_BT = torch.full((len(rows), longest), PAD_ID)
    for row, ids_T in zip(rows, ids_BT, strict=True):
        ids_T[: len(row.prompt)] = torch.tensor(row.prompt)
    device = embed.weight.device
    room = max(len(row.prompt) + row.limit(seq_len) for row in rows)
    decoding = Decoding(network.decoder, memory_LBSD, len(rows), room, embed.weight)
    hidden_BTD = decoding.prompt(embed(ids_BT.to(device)))
    last_B = torch.tensor([len(row.prompt) - 1 for row in rows], device=device)
    hidden_BD = hidden_BTD[torch.arange(len(rows), device=device), last_B]
    while True:
        logits_BV = network.lm_head.logits(hidden_BD).float().cpu()
        said: list[int | None] = []
        for number, (row, logits_V) in enumerate(zip(rows, logits_BV, strict=True)):
            if row.ended(seq_len):
                said.append(None)
                continue
            if watch is not None and row.said:
                watch(number, logits_V)
            row.said.append(row.choose(logits_V))
            said.append(row.said[-1])
        yield tuple(said)
        if all(row.ended(seq_len) for row in rows):
            return
        # A row that has ended computes its last token again, at its place.
        tokens_B1 = torch.tensor([[row.said[-1]] for row in rows], device=device)
        hidden_BD = decoding.next(embed(tokens_B1), [row.end for row in rows])[:, 0]


@torch.no_grad()
def write(network: ReactiveTransformer, memory_LBSD: Tensor, interactions: Sequence[Sequence[int]]) -> Tensor:
    """The next memory [L, B, S, D]: each row's interaction, as ids, written into its memory."""
    assert network.embedding is not None
    assert network.encoder is not None
    assert network.memory_attention is not None
    device = network.embedding.weight.device
    lengths_B = torch.tensor([len(ids) for ids in interactions])
    positions_BT = torch.arange(int(lengths_B.max()))[None].expand(len(interactions), -1)
    ids_BT = torch.full(positions_BT.shape, PAD_ID)
    for ids, ids_T in zip(interactions, ids_BT, strict=True):
        ids_T[: len(ids)] = torch.tensor(ids)
    keys_BT = positions_BT < lengths_B.unsqueeze(1)
    ids_BT, positions_BT, keys_BT = (x.to(device) for x in (ids_BT, positions_BT, keys_BT))
    encoded_LBTD = network.encoder(network.embedding(ids_BT), positions_BT, keys_BT=keys_BT)
    return network.memory_attention(memory_LBSD, encoded_LBTD.to(memory_LBSD), positions_BT, keys_BT).memory_LBSD
