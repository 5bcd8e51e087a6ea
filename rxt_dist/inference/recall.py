"""What a model recalls in conversations of its own: it answers held-out dialogues turn by turn, greedily.

Each answer is written into the memory as the model gave it. Where a turn asks for what was told before, the same
question is put to no memory (zeros) and to another dialogue's memory of the same turn as well: what these give is
guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rxt_dist.data.dialogues import DialogueDataset, load_dialogue_manifest
from rxt_dist.data.interactions import ANSWER_ID, THINK_ID, are_system_prompts
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.errors import DataError
from rxt_dist.inference.assistant import Assistant
from rxt_dist.inference.evaluation import MEMORIES
from rxt_dist.inference.events import Answer
from rxt_dist.inference.generate import Row, answer, write
from rxt_dist.inference.sampling import Sampling
from rxt_dist.model.memory import initial_memory

_LOOKED_AT = 64


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    said: what the model answered, by the memory that it read: `true` in every turn, the others where it recalls.
    value, distance: what the turn asks for, and how many turns before it was told; "" and 0: it asks for nothing.
    """

    query: str
    said: dict[str, str]
    value: str = ""
    distance: int = 0


@dataclass(frozen=True)
class Recalled:
    """Of `asked` questions for what was told `distance` turns before, how many answers hold it."""

    source: str
    distance: int
    memory: str
    asked: int
    recalled: int

    @property
    def recall(self) -> float:
        """Share of the questions."""
        return self.recalled / self.asked


def converse(
    assistant: Assistant, data: Path, source: str, dialogues: int, at_once: int = 32, seed: int = 0
) -> Iterator[list[Turn]]:
    """The model's own conversations over the first held-out dialogues of a source; what users say is the dialogue's.

    Raises:
        ConfigError: no such source.
        DataError: no such data, of another tokenizer, or with longer turns than the model reads.
    """
    dataset = DialogueDataset(data, "eval", source, assistant.text.fingerprint)
    if dataset.manifest.seq_len > assistant.config.seq_len:
        raise DataError(
            f"{data} has turns of up to {dataset.manifest.seq_len:,} tokens, but the model reads at most "
            f"{assistant.config.seq_len:,}. Build the dialogues with --seq-len {assistant.config.seq_len}."
        )
    count = min(dialogues, len(dataset))
    for first in range(0, count, at_once):
        yield from _Group(assistant, dataset, range(first, min(first + at_once, count)), seed).conversations()


def sources_that_recall(data: Path) -> list[str]:
    """Sources that hold out dialogues which ask for what they told.

    Raises:
        DataError: no such data, or none of it asks.
    """
    manifest = load_dialogue_manifest(data)
    found = []
    for name in (item.name for item in manifest.sources):
        dataset = DialogueDataset(data, "eval", name)
        if any(dataset.recalls(index)[:, 0].any() for index in range(min(len(dataset), _LOOKED_AT))):
            found.append(name)
    if not found:
        raise DataError(
            f"{data} holds out no dialogue that says what it recalls. Make such ones with `rxt-dist data recall`, and "
            "build them with `rxt-dist data interactions --kind dialogues`."
        )
    return found


def recall_by_distance(source: str, conversations: Iterable[Sequence[Turn]]) -> list[Recalled]:
    """How much is recalled at each distance, with each memory."""
    asked: Counter[int] = Counter()
    recalled: Counter[tuple[int, str]] = Counter()
    for turn in (turn for conversation in conversations for turn in conversation if turn.value):
        asked[turn.distance] += 1
        recalled.update((turn.distance, memory) for memory, said in turn.said.items() if holds(said, turn.value))
    return [
        Recalled(source, distance, memory, asked[distance], recalled[distance, memory])
        for distance in sorted(asked)
        for memory in MEMORIES
    ]


def holds(said: str, value: str) -> bool:
    """Whether a text has the value in it as words of its own: 8 is not in 89."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said) is not None


class _Group:
    """Some dialogues that are gone through together, each as it would be alone."""

    def __init__(self, assistant: Assistant, dataset: DialogueDataset, indices: Sequence[int], seed: int) -> None:
        self.assistant = assistant
        self.dialogues = [[turn.tolist() for turn in dataset.dialogue(index)] for index in indices]
        self.system_query = dataset.manifest.system_query
        self.recalls = [dataset.recalls(index).tolist() for index in indices]
        generators = [torch.Generator().manual_seed(seed + index) for index in indices]
        drawn = [initial_memory(assistant.config, 1, generator) for generator in generators]
        self.memory_LBSD = torch.cat(drawn, dim=1).to(assistant.device)

    def conversations(self) -> list[list[Turn]]:
        found: list[list[Turn]] = [[] for _ in self.dialogues]
        for number in range(max(map(len, self.dialogues))):
            here = [row for row, dialogue in enumerate(self.dialogues) if number < len(dialogue)]
            ids = {row: self.dialogues[row][number] for row in here}
            prompts = {row: prompt for row in here if (prompt := _prompt(ids[row], self.system_query)) is not None}
            said = {"true": self._said(prompts, self.memory_LBSD)}
            asking = {row: prompts[row] for row in prompts if self.recalls[row][number][0]}
            said["zero"] = self._said(asking, torch.zeros_like(self.memory_LBSD))
            if len(self.dialogues) > 1:
                said["foreign"] = self._said(asking, self.memory_LBSD.roll(1, dims=1))
            for row in prompts:
                distance, first, end = self.recalls[row][number]
                value = self._text(ids[row][first:end]) if distance else ""
                answers = {memory: self._answer(rows[row]) for memory, rows in said.items() if row in rows}
                found[row].append(Turn(self._query(prompts[row][0]), answers, value, distance))
            written = [said["true"][row].written if row in prompts else ids[row] for row in here]
            new_LBSD = write(self.assistant.network, self.memory_LBSD[:, here], written)
            index = torch.tensor(here, device=self.assistant.device)
            self.memory_LBSD = self.memory_LBSD.index_copy(1, index, new_LBSD)
        return found

    def _said(self, prompts: dict[int, tuple[list[int], int]], memory_LBSD: Tensor) -> dict[int, Row]:
        greedy, controls = Sampling(temperature=0), self.assistant.text.controls
        rows = {row: Row(ids, mode, greedy, torch.Generator(), controls) for row, (ids, mode) in prompts.items()}
        if rows:
            for _ in answer(self.assistant.network, memory_LBSD[:, list(rows)], list(rows.values())):
                pass
        return rows

    def _answer(self, row: Row) -> str:
        return Answer.of(row.said, self.assistant.text).answer.strip()

    def _query(self, prompt: list[int]) -> str:
        return self._text([token for token in prompt if token >= SPECIAL_COUNT])

    def _text(self, ids: list[int]) -> str:
        return self.assistant.text.decode(ids).strip()


def _prompt(ids: list[int], system_query: tuple[int, ...]) -> tuple[list[int], int] | None:
    """What a turn gives the model, and the mode it asks for; None for a system instruction, which is not answered."""
    if are_system_prompts(np.array([ids]), system_query)[0]:
        return None
    at = next(place for place, token in enumerate(ids) if token in (ANSWER_ID, THINK_ID))
    return ids[:at], ids[at]
