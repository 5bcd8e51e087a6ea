"""What a decoder without a memory recalls, by what stands before the question in its row.

    python stateless.py RUN DIALOGUES --rows N [--history] --source SOURCE ...

Held-out dialogues are gone through as `rxt_dist.inference.recall` does it with a memory: the model answers every turn,
greedily, and what it said is what its history holds from then on. Perplexity is that of the dialogue's own answers
after its own turns. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from recall_parts.histories import history
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.interactions import ANSWER_ID, NO_LOSS, answer_labels
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.data.text import Text
from rxt_dist.inference.events import Answer
from rxt_dist.inference.generate import Row, answer
from rxt_dist.inference.load import load_network
from rxt_dist.inference.recall import Turn, recall_by_distance
from rxt_dist.inference.sampling import Sampling
from rxt_dist.model.reactive import ReactiveTransformer

_AT_ONCE = 50


class Stateless:
    """A network and its tokenizer; `whole`: it reads all turns before the question, else none."""

    def __init__(self, network: ReactiveTransformer, text: Text, whole: bool) -> None:
        self.network, self.text, self.whole = network.eval().requires_grad_(False), text, whole

    def converse(self, data: DialogueDataset, dialogues: int) -> Iterator[list[Turn]]:
        """Conversations over the first dialogues; what users say is the dialogue's."""
        for first in range(0, dialogues, _AT_ONCE):
            yield from self._conversations(data, range(first, min(first + _AT_ONCE, dialogues)))

    def _conversations(self, data: DialogueDataset, indices: range) -> list[list[Turn]]:
        dialogues = [data.dialogue(index) for index in indices]
        recalls = [data.recalls(index).tolist() for index in indices]
        found: list[list[Turn]] = [[] for _ in indices]
        before = [[BOS_ID] for _ in indices]
        for number in range(max(map(len, dialogues))):
            here = [row for row, dialogue in enumerate(dialogues) if number < len(dialogue)]
            turns = {row: dialogues[row][number].tolist() for row in here}
            queries = {row: turn[1 : turn.index(ANSWER_ID)] for row, turn in turns.items()}
            rows = self._answers([before[row] + queries[row] for row in here], data.manifest.seq_len)
            for row, of in zip(here, rows, strict=True):
                if self.whole:
                    before[row] = of.written if of.said[-1] == EOS_ID else [*of.written, EOS_ID]
                distance, start, end = recalls[row][number]
                value = self._text(turns[row][start:end]) if distance else ""
                said = Answer.of(of.said, self.text).answer.strip()
                found[row].append(Turn(self._text(queries[row][1:]), {"true": said}, value, distance))
        return found

    def _answers(self, prompts: list[list[int]], most: int) -> list[Row]:
        """What is said after each prompt, in at most so many tokens."""
        sampling = Sampling(temperature=0, max_tokens=most)
        rows = [Row(ids, ANSWER_ID, sampling, torch.Generator(), self.text.controls) for ids in prompts]
        for _ in answer(self.network, None, rows):
            pass
        return rows

    def _text(self, ids: list[int]) -> str:
        return self.text.decode(ids).strip()

    def perplexities(self, data: DialogueDataset, dialogues: int) -> list[dict[str, float]]:
        """By turn: `targets` tokens that have to be said, the perplexity of these, and the mean number of tokens in the
        row `before` the turn."""
        sums: dict[int, list[float]] = {}
        for index in range(dialogues):
            turns = data.dialogue(index)
            rows = [history(turns)] if self.whole else turns
            losses = torch.cat([self._losses(torch.from_numpy(ids.astype("int64"))) for ids in rows])
            # A row of histories has no [BOS] before a later turn.
            lengths = [len(turn) - (self.whole and number > 0) for number, turn in enumerate(turns)]
            for number, of_turn in enumerate(losses.split(lengths)):
                before = sum(lengths[:number]) if self.whole else 0
                values = float(of_turn.nansum()), float(of_turn.isfinite().sum()), before, 1
                sums[number] = [sum(pair) for pair in zip(sums.get(number, [0.0] * 4), values, strict=True)]
        return [
            {"turn": number, "targets": targets, "perplexity": math.exp(loss / targets), "before": before / count}
            for number, (loss, targets, before, count) in sorted(sums.items())
        ]

    def _losses(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Nats of each token of one row [T] that has to be said after it; NaN where nothing has."""
        network = self.network
        assert network.embedding is not None
        assert network.decoder is not None
        assert network.lm_head is not None
        hidden_1TD = network.decoder(network.embedding(ids_T[None]), torch.arange(len(ids_T))[None], None).hidden_BTD
        labels_T = torch.from_numpy(answer_labels(ids_T[None].numpy()))[0]
        losses_T = F.cross_entropy(network.lm_head.logits(hidden_1TD[0]), labels_T, reduction="none")
        return losses_T.masked_fill(labels_T == NO_LOSS, float("nan"))


def evaluate(run: Path, dialogues: Path, sources: list[str], rows: int, whole: bool) -> dict[str, Any]:
    """Recall and perplexity by turn, of the first held-out dialogues of each source."""
    network, text = load_network(run)
    model = Stateless(network, text, whole)
    recall: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for name in sources:
        data = DialogueDataset(dialogues, "eval", name, text.fingerprint)
        count = min(rows, len(data))
        conversations = list(model.converse(data, count))
        recall += [vars(one) for one in recall_by_distance(name, conversations) if one.memory == "true"]
        turns += [{"source": name, "memory": "true"} | one for one in model.perplexities(data, count)]
    return {"recall": recall, "turns": turns}


def main() -> None:
    """Parse the arguments, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--history", action="store_true", help="it reads the whole history")
    arguments = parser.parse_args()
    whole, sources = arguments.history, arguments.source
    print(json.dumps(evaluate(arguments.run, arguments.dialogues, sources, arguments.rows, whole)))


if __name__ == "__main__":
    main()
