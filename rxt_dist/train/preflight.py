"""Everything that can be refused before anything is built or overwritten."""

from __future__ import annotations

from pathlib import Path

import torch

from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import DataFacts, validate_run
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.mixture import planned_order
from rxt_dist.data.rows import BOUNDARY_POLICY
from rxt_dist.data.sampler import GlobalOrder
from rxt_dist.engine.optimizer import parameter_groups
from rxt_dist.engine.schedule import batch_rows
from rxt_dist.errors import DataError
from rxt_dist.files import require_folder, require_free_space
from rxt_dist.model.count import count_system
from rxt_dist.model.reactive import ReactiveTransformer

# Weights and two moments in float32.
_CHECKPOINT_BYTES_PER_PARAMETER = 12


def preflight(config: RunConfig, world_size: int) -> tuple[TokenDataset, GlobalOrder]:
    """Open the data, check the run against it, and plan the order of its rows; the same on every rank.

    Raises:
        ConfigError, DataError, DiskError: whatever would stop this run later.
    """
    dataset, order = _open_data(config, world_size)
    batch_rows(config.train, dataset.seq_len)
    with torch.device("meta"):
        model = training_model(config)
    parameter_groups(model.named_parameters(), model.matrices, config.optimizer)
    require_folder(config.directory)
    # While a checkpoint is written, the ones that it will replace are still there.
    needed = 2 * _CHECKPOINT_BYTES_PER_PARAMETER * count_system(config.model).total
    require_free_space(config.directory, needed, "Keeping the checkpoints of this run")
    return dataset, order


def training_model(config: RunConfig) -> ReactiveTransformer:
    """The network of this stage, without weights; memory attention is not part of joint pre-training."""
    return ReactiveTransformer(config.model.model_copy(update={"memory_attention": None}))


def order_lines(order: GlobalOrder) -> list[str]:
    """One line per source: how much of it the run reads; a source that it never reads is said to be one."""
    lines = []
    for source in order.plan():
        if source.tokens:
            share = f"{source.share:.1%} of the tokens, {source.epochs:.2f} passes over {source.rows:,} rows"
            lines.append(f"data: {source.name}: {share}")
        else:
            lines.append(f"data: {source.name}: NOT READ (its share of the mixture is below 1/4096 or not given)")
    return lines


def _open_data(config: RunConfig, world_size: int) -> tuple[TokenDataset, GlobalOrder]:
    wanted = _fingerprint(config.data.tokenizer) if config.data.tokenizer else None
    dataset = TokenDataset(config.data.path, wanted)
    manifest = dataset.manifest
    if manifest.boundaries != BOUNDARY_POLICY:
        raise DataError(
            f"{config.data.path} holds {manifest.boundaries}, of which only the answers carry loss, but pre-training "
            f"reads documents. Name a dataset that `rxt-dist data build` made."
        )
    names = tuple(source.name for source in dataset.sources)
    facts = DataFacts(dataset.seq_len, manifest.vocab_size, names, manifest.tokenizer_sha256)
    validate_run(config, world_size, facts)
    order = planned_order(dataset.sources, dataset.seq_len, config.data, config.train.total_tokens, config.seed)
    return dataset, order


def _fingerprint(tokenizer: Path) -> str:
    try:
        return tokenizer_fingerprint(tokenizer.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.tokenizer is {tokenizer}, which cannot be read as a tokenizer.json: {error}. Name the file that "
            "the data was built with, or leave the field out to take the data's own."
        ) from error
