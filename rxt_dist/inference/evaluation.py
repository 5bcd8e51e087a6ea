"""How well a model does on held-out data: dialogues turn by turn with its memory, rows as its stage evaluates them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rxt_dist.config.load import load_run
from rxt_dist.config.run import DataConfig, ParallelConfig, RunConfig, run_class
from rxt_dist.config.stages import DEFAULT_STAGE
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.interactions import NO_LOSS
from rxt_dist.data.text import Text
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import DataError
from rxt_dist.inference.assistant import Assistant
from rxt_dist.inference.generate import write
from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.base import stage_class
from rxt_dist.train.evaluate import Evaluation, evaluate

MEMORIES = ("true", "zero", "foreign")
_CHUNK_TOKENS = 2048
_ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class TurnFigures:
    """One turn of all dialogues that have it, read with one memory: the dialogue's own, none, or another dialogue's.

    targets: tokens that the model has to say. loss: nats a target. accuracy: share of them that it thinks most of.
    """

    source: str
    turn: int
    memory: str
    targets: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate_dialogues(
    assistant: Assistant, data: Path, dialogues: int, at_once: int = 8, seed: int = 0
) -> list[TurnFigures]:
    """Held-out dialogues of each source, turn by turn; after each turn it is written into the memory.

    Args:
        dialogues: of each source, at most.
        at_once: read together; at least two, since each is the other's foreign memory.

    Raises:
        DataError: no such data, of another tokenizer, with longer turns than the model reads, or none held out.
    """
    whole = DialogueDataset(data, "eval", tokenizer_sha256=assistant.text.fingerprint)
    if whole.manifest.seq_len > assistant.config.seq_len:
        raise DataError(
            f"{data} has turns of up to {whole.manifest.seq_len:,} tokens, but the model reads at most "
            f"{assistant.config.seq_len:,}. Build the dialogues with --seq-len {assistant.config.seq_len}."
        )
    found: list[TurnFigures] = []
    for source in (item.name for item in whole.manifest.sources):
        dataset = DialogueDataset(data, "eval", source)
        count = min(dialogues, len(dataset))
        if count < 2:
            continue
        sums: dict[tuple[int, str], Tensor] = {}
        for first in range(0, count, at_once):
            # The last group takes the one before it along, should it be alone.
            begin = min(first, count - 2)
            indices = range(begin, min(first + at_once, count))
            _add_group(sums, assistant, dataset, list(indices), counted=len(indices) - (first - begin), seed=seed)
        found += [
            TurnFigures(source, turn, memory, int(targets), loss / targets, hits / targets)
            for (turn, memory), (loss, targets, hits) in sorted(
                ((key, value.tolist()) for key, value in sums.items()), key=lambda item: _place(item[0])
            )
        ]
    if not found:
        raise DataError(f"{data} holds out fewer than two dialogues of every source, so there is nothing to compare.")
    return found


def _place(key: tuple[int, str]) -> tuple[int, int]:
    return key[0], MEMORIES.index(key[1])


def _add_group(
    sums: dict[tuple[int, str], Tensor],
    assistant: Assistant,
    dataset: DialogueDataset,
    indices: list[int],
    counted: int,
    seed: int,
) -> None:
    """Add loss, targets and hits of the last `counted` of these dialogues."""
    network, config = assistant.network, assistant.config
    generators = [torch.Generator().manual_seed(seed + index) for index in indices]
    memory_LBSD = torch.cat([initial_memory(config, 1, of) for of in generators], dim=1).to(assistant.device)
    batch = dataset.batch(indices)
    for row in np.flatnonzero(batch.system_B).tolist():
        # Written before turn 0, which is then the first row that asks.
        prompt = batch.tokens_BUT[row, 0, : batch.lengths_BU[row, 0]].tolist()
        memory_LBSD[:, row : row + 1] = write(network, memory_LBSD[:, row : row + 1], [prompt])
        for of_U in (batch.tokens_BUT[row], batch.lengths_BU[row], batch.labels_BUT[row]):
            of_U[:-1], of_U[-1] = of_U[1:].copy(), 0
    for turn in range(batch.tokens_BUT.shape[1]):
        lengths = batch.lengths_BU[:, turn]
        rows = [row for row in range(len(indices)) if lengths[row]]
        if not rows:
            return
        read = [row for row in rows if row >= len(indices) - counted]
        views = {"true": memory_LBSD, "zero": torch.zeros_like(memory_LBSD), "foreign": memory_LBSD.roll(1, dims=1)}
        if read:
            tokens_BT, labels_BT = (
                torch.from_numpy(of[read, turn, : max(lengths[read])]).to(assistant.device)
                for of in (batch.tokens_BUT, batch.labels_BUT)
            )
            for name, view_LBSD in views.items():
                found = _sums(network, tokens_BT, labels_BT, view_LBSD[:, read])
                sums[turn, name] = sums.get((turn, name), torch.zeros_like(found)) + found
        ids = [batch.tokens_BUT[row, turn, : lengths[row]].tolist() for row in rows]
        written = write(network, memory_LBSD[:, rows], ids)
        memory_LBSD = memory_LBSD.index_copy(1, torch.tensor(rows, device=assistant.device), written)


def _sums(network: ReactiveTransformer, tokens_BT: Tensor, labels_BT: Tensor, memory_LBSD: Tensor) -> Tensor:
    """float64 [3] on the host: loss, targets, hits."""
    assert network.embedding is not None
    assert network.decoder is not None
    assert network.lm_head is not None
    embedded_BTD = network.embedding(tokens_BT)
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None].expand_as(tokens_BT)
    hidden_BTD = network.decoder(embedded_BTD, positions_BT, memory_LBSD.to(embedded_BTD)).hidden_BTD
    labelled_BT = labels_BT != NO_LOSS
    found = network.lm_head(hidden_BTD[labelled_BT], labels_BT[labelled_BT], _CHUNK_TOKENS)
    return torch.stack([found.loss.double(), found.targets.double(), found.correct.double()]).cpu()


def evaluate_rows(
    place: Path, network: ReactiveTransformer, text: Text, data: Path, rows_per_source: int, device: torch.device
) -> list[Evaluation]:
    """Held-out rows of each source, as the stage of a run evaluates them; an export is taken for one of pre-training.

    Raises:
        DataError: the data is not what the stage reads, of another tokenizer, or has longer rows than the model reads;
            or the network lacks a part that the stage computes with.
    """
    run = _run(place, network, data)
    source = stage_class(run).source(run)
    if source.facts.tokenizer_sha != text.fingerprint:
        raise DataError(
            f"{data} was made with another tokenizer than the model's, so that its ids mean something else."
        )
    if source.facts.seq_len > network.config.seq_len:
        raise DataError(
            f"{data} has rows of {source.facts.seq_len:,} tokens, but the model reads at most "
            f"{network.config.seq_len:,}. Make shorter ones with `rxt-dist data repack`."
        )
    missing = [part for part in run.stage.parts() if getattr(network, part) is None]
    if missing:
        raise DataError(
            f"{place} has no {', '.join(missing)}, with which stage '{run.stage.kind}' reads {data}. Name dialogues, "
            "which a whole system reads with its memory, or the run itself."
        )
    stage = stage_class(run)(network, run)
    engine = PlainEngine(stage, run, device)
    return evaluate(engine, stage, source, rows_per_source, _ROWS_AT_ONCE)


def _run(place: Path, network: ReactiveTransformer, data: Path) -> RunConfig:
    """The run, reading other data in one process; of an export one of the default stage."""
    file = place / "config.resolved.yaml"
    if file.is_file():
        run = load_run(file)
        plain = ParallelConfig(engine="plain", zero=0)
        return run.model_copy(update={"data": DataConfig(path=data), "parallel": plain, "start": None})
    content: dict[str, Any] = {
        "name": "evaluation",
        "model": network.config.model_dump(mode="json"),
        "data": {"path": data},
        "train": {"total_tokens": 1, "global_batch_tokens": 1, "precision": "float32"},
        "checkpoint": {"every_tokens": 1},
        "parallel": {"engine": "plain", "zero": 0},
    }
    return run_class(DEFAULT_STAGE).model_validate(content)
