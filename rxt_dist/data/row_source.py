"""Rows of documents or interactions, of one or several datasets that phases name, as the source of a run's batches."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import DataFacts
from rxt_dist.data.dataset import JoinedDataset, TokenDataset
from rxt_dist.data.loader import BatchReader, Int64Array, TokenBatch, eval_reader
from rxt_dist.data.manifest import SourceInfo, tokenizer_fingerprint
from rxt_dist.data.mixture import PhaseDataset, phase_datasets, planned_order
from rxt_dist.data.rows import BOUNDARY_POLICY
from rxt_dist.data.sampler import GlobalOrder
from rxt_dist.errors import DataError


class RowSource:
    """The data source of stages that read documents, or single interactions. See `DataSource`.

    Args:
        boundaries: what the segments of a row are: BOUNDARY_POLICY (documents) or INTERACTION_BOUNDARIES.

    Raises:
        DataError: the data is missing or damaged, was made with another tokenizer than the run names, or holds
            something else than the segments asked for.
    """

    def __init__(self, run: RunConfig, boundaries: str = BOUNDARY_POLICY) -> None:
        self._run = run
        wanted = tokenizer_of_run(run)
        opened: dict[str, TokenDataset] = {}

        def look(path: Path) -> PhaseDataset:
            dataset = TokenDataset(path, wanted)
            _require(dataset, boundaries, run.stage.kind)
            return PhaseDataset.of(opened.setdefault(dataset.digest, dataset).root, dataset.manifest)

        self._read = phase_datasets(run.data, look)
        self._dataset = JoinedDataset([opened[digest] for digest in self._read.digests])

    @property
    def digests(self) -> tuple[str, ...]:
        """Root digests of the datasets, in the order in which the phases first read them."""
        return self._read.digests

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """What is weighted and evaluated together: the sources of every dataset that a phase names."""
        return self._read.sources

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, padding included."""
        return self._dataset.seq_len

    @property
    def facts(self) -> DataFacts:
        """What the first dataset states about itself; the others are like it."""
        manifest = self._dataset.datasets[0].manifest
        names = tuple(source.name for source in manifest.sources)
        return DataFacts(self._dataset.seq_len, self.row_tokens, manifest.vocab_size, names, manifest.tokenizer_sha256)

    @cached_property
    def order(self) -> GlobalOrder:
        """Which row stands at a position; made when it is first asked for, since a run may still be refused before."""
        run = self._run
        return planned_order(self._read, run.data, run.train.total_tokens, run.seed)

    @cached_property
    def _reader(self) -> BatchReader:
        return BatchReader(self._dataset, self.order)

    def read(self, positions: Int64Array, part: slice) -> TokenBatch:
        """See `DataSource.read`. All rows have one length, so the rest of the batch decides nothing."""
        return self._reader.read(positions[part])

    def held_out(self, source: int) -> int:
        """See `DataSource.held_out`."""
        return self._dataset.rows(source, "eval")

    def read_held_out(self, source: int, rows: Int64Array, part: slice) -> TokenBatch:
        """See `DataSource.read_held_out`."""
        wanted = rows[part]
        read = eval_reader(self._dataset, source).read(np.maximum(wanted, 0))
        return read.first(int(np.count_nonzero(wanted >= 0)))


def _require(dataset: TokenDataset, boundaries: str, kind: str) -> None:
    found = dataset.manifest.boundaries
    if found == boundaries:
        return
    if boundaries == BOUNDARY_POLICY:
        raise DataError(
            f"{dataset.root} holds {found}, of which only the answers carry loss, but stage '{kind}' reads documents. "
            f"Name a dataset that `rxt-dist data build` made."
        )
    raise DataError(
        f"{dataset.root} holds documents, which have no answers, but stage '{kind}' reads interactions. Name a dataset "
        f"that `rxt-dist data interactions` made."
    )


def tokenizer_of_run(run: RunConfig) -> str | None:
    """Fingerprint of the tokenizer that the run names; None where it takes the data's own.

    Raises:
        DataError: it cannot be read.
    """
    tokenizer = run.data.tokenizer
    if tokenizer is None:
        return None
    try:
        return tokenizer_fingerprint(tokenizer.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.tokenizer is {tokenizer}, which cannot be read as a tokenizer.json: {error}. Name the file that "
            "the data was built with, or leave the field out to take the data's own."
        ) from error
