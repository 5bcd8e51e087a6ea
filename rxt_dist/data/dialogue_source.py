"""Dialogues as the source of a run's batches: one row is one dialogue, of which the first turns are read.

A row counts in budgets as so many turns of the longest length that the dataset allows, whatever it really has: budgets,
orders and resumes are then those of rows of documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import DataFacts
from rxt_dist.data.dialogue_rows import dialogue_phase_dataset
from rxt_dist.data.dialogues import DialogueDataset, DialogueManifest, load_dialogue_manifest
from rxt_dist.data.loader import Int64Array
from rxt_dist.data.manifest import SourceInfo
from rxt_dist.data.mixture import PhaseDataset, PhaseDatasets, phase_datasets, planned_order
from rxt_dist.data.row_source import tokenizer_of_run
from rxt_dist.data.sampler import GlobalOrder
from rxt_dist.errors import DataError


@dataclass(frozen=True)
class TurnBatch:
    """B dialogues of U turns of T tokens, in host memory.

    tokens_BUT: int64 ids, [PAD] (0) behind each turn. lengths_BU: int64 tokens of each turn, 0 where a dialogue has
    ended. samples_B: int64 global position of each dialogue; the key of all randomness that concerns it. recalls_BU3:
    int64 (distance, first token, end) of the value that a turn's answer recalls: told `distance` turns before, it is
    tokens_BUT[b, u, first:end]. Zeros where a turn recalls nothing. system_query: see `are_system_prompts`.
    """

    tokens_BUT: Tensor
    lengths_BU: Tensor
    samples_B: Tensor
    recalls_BU3: Tensor
    system_query: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.samples_B)

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths_BU.sum())

    @property
    def pairs(self) -> int:
        """Query-key pairs of full attention within turns: the sum of their squared lengths."""
        return int((self.lengths_BU**2).sum())

    def micro_batches(self, rows: int) -> list[TurnBatch]:
        """Consecutive parts of `rows` dialogues, all with the turns and the width of the whole batch.

        Raises:
            ValueError: B is not a multiple of `rows`.
        """
        if rows < 1 or self.rows % rows:
            raise ValueError(f"a batch of {self.rows} dialogues cannot be split into micro-batches of {rows}")
        columns = (self.tokens_BUT, self.lengths_BU, self.samples_B, self.recalls_BU3)
        parts = [TurnBatch(*part) for part in zip(*(column.split(rows) for column in columns), strict=True)]
        return [replace(part, system_query=self.system_query) for part in parts]


class DialogueSource:
    """The data source of stages that read dialogues. See `DataSource`.

    Args:
        turns: how many turns of a dialogue are read; later ones are left out.

    Raises:
        DataError: the data is missing or damaged, was made with another tokenizer than the run names, holds something
            else than dialogues, or a phase names dialogues of other lengths.
    """

    def __init__(self, run: RunConfig, turns: int) -> None:
        self._run, self._turns = run, turns
        self._tokenizer = tokenizer_of_run(run)
        self._manifests: dict[str, DialogueManifest] = {}

        def look(path: Path) -> PhaseDataset:
            manifest = load_dialogue_manifest(path)
            self._require_alike(path, manifest)
            self._manifests.setdefault(manifest.root_digest, manifest)
            return dialogue_phase_dataset(path, manifest, turns)

        self._read: PhaseDatasets = phase_datasets(run.data, look)
        self._opened: dict[tuple[int, str], DialogueDataset] = {}
        for source in range(len(self.sources)):
            for split in ("train", "eval"):
                self._dataset(source, split)

    def _require_alike(self, path: Path, manifest: DialogueManifest) -> None:
        for other in self._manifests.values():
            if other.seq_len != manifest.seq_len:
                raise DataError(
                    f"{path}, which a phase of data.mixture names, has turns of up to {manifest.seq_len} tokens, but "
                    f"{self._run.data.path} of up to {other.seq_len}: build it again with --seq-len {other.seq_len}."
                )

    @property
    def digests(self) -> tuple[str, ...]:
        """Root digests of the datasets, in the order in which the phases first read them."""
        return self._read.digests

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """What is weighted and evaluated together; the rows of a source are its dialogues."""
        return self._read.sources

    @property
    def row_tokens(self) -> int:
        """Tokens that a dialogue counts for: all its turns, each as long as the longest may be."""
        return self._read.seq_len

    @property
    def facts(self) -> DataFacts:
        """What the first dataset states about itself; the others are like it."""
        manifest = self._manifests[self.digests[0]]
        names = tuple(source.name for source in manifest.sources)
        return DataFacts(manifest.seq_len, self.row_tokens, manifest.vocab_size, names, manifest.tokenizer_sha256)

    @cached_property
    def order(self) -> GlobalOrder:
        """Which dialogue stands at a position; made when it is first asked for, since a run may be refused before."""
        return planned_order(self._read, self._run.data, self._run.train.total_tokens, self._run.seed)

    def read(self, positions: Int64Array, part: slice) -> TurnBatch:
        """See `DataSource.read`: as many turns, and as wide, as the longest of all these dialogues needs."""
        sources, rows = self.order.rows(positions)
        return self._batch("train", sources, rows, positions, part)

    def held_out(self, source: int) -> int:
        """See `DataSource.held_out`."""
        return self._read.sources[source].eval.totals.rows

    def read_held_out(self, source: int, rows: Int64Array, part: slice) -> TurnBatch:
        """See `DataSource.read_held_out`."""
        return self._batch("eval", np.full_like(rows, source), rows, np.maximum(rows, 0), part)

    def _batch(self, split: str, sources: Int64Array, rows: Int64Array, samples: Int64Array, part: slice) -> TurnBatch:
        dialogues = [
            self._dataset(source, split).dialogue(row)[: self._turns] if row >= 0 else []
            for source, row in zip(sources.tolist(), rows.tolist(), strict=True)
        ]
        turns = max(len(dialogue) for dialogue in dialogues)
        width = max(len(turn) for dialogue in dialogues for turn in dialogue)
        mine = dialogues[part]
        recalls_BU3 = np.zeros((len(mine), turns, 3), dtype=np.int64)
        for b, (source, row) in enumerate(zip(sources[part].tolist(), rows[part].tolist(), strict=True)):
            recalls_BU3[b, : len(mine[b])] = self._dataset(source, split).recalls(row)[: self._turns] if row >= 0 else 0
        tokens_BUT = np.zeros((len(mine), turns, width), dtype=np.int64)
        lengths_BU = np.zeros((len(mine), turns), dtype=np.int64)
        for b, dialogue in enumerate(mine):
            for u, turn in enumerate(dialogue):
                tokens_BUT[b, u, : len(turn)] = turn
                lengths_BU[b, u] = len(turn)
        tokens, lengths, own, recalls = map(torch.from_numpy, (tokens_BUT, lengths_BU, samples[part], recalls_BU3))
        return TurnBatch(tokens, lengths, own, recalls, self._system_query)

    @cached_property
    def _system_query(self) -> tuple[int, ...]:
        """Of one tokenizer, so that all datasets that state it state the same."""
        return next((manifest.system_query for manifest in self._manifests.values() if manifest.system_query), ())

    def _dataset(self, source: int, split: str) -> DialogueDataset:
        if (source, split) not in self._opened:
            dataset, own = self._read.own(source)
            name = dataset.sources[own].name
            self._opened[source, split] = DialogueDataset(dataset.path, split, name, self._tokenizer)
        return self._opened[source, split]
