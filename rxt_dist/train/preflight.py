"""Everything that can be refused before anything is built or overwritten."""

from __future__ import annotations

import torch

from rxt_dist.checkpoint.start import check_start, check_tokenizer
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.run import RunConfig, StartConfig
from rxt_dist.config.schedules import steps
from rxt_dist.config.validate import validate_run
from rxt_dist.data.sampler import GlobalOrder
from rxt_dist.engine.optimizer import parameter_groups
from rxt_dist.errors import ConfigError
from rxt_dist.files import require_folder, require_free_space
from rxt_dist.stages.base import DataSource, build_network, stage_class
from rxt_dist.train.run_dir import RunDirectory

# Weights, and two moments, in float32.
_WEIGHT_BYTES, _MOMENT_BYTES = 4, 8


def preflight(config: RunConfig, world_size: int, start_later: bool = False) -> DataSource:
    """Open the data, check the run against it, and plan the order of its rows; the same on every rank.

    Args:
        start_later: the runs that weights come from are not trained yet.

    Raises:
        ConfigError, DataError, CheckpointError, DiskError: whatever would stop this run later.
    """
    data = stage_class(config).source(config)
    validate_run(config, world_size, data.facts)
    # Planned now: it refuses a mixture that the data cannot serve, and the calculator a ramp that has no steps.
    data.order.plan()
    next(steps(config.train, data.row_tokens))
    with torch.device("meta"):
        model = build_network(config)
    rate_group = config.stage.rate_group
    trained = [(name, p) for name, p in model.named_parameters() if rate_group(name) is not None]
    parameter_groups(trained, model.matrices, config.optimizer, rate_group)
    if config.start is not None and not start_later and not has_checkpoints(config):
        _require_another_run(config.start, config)
        check_start(config.start, model)
        for origin in config.start.origins:
            check_tokenizer(origin, data.facts.tokenizer_sha)
    require_folder(config.directory)
    moved = sum(parameter.numel() for _, parameter in trained)
    size = _WEIGHT_BYTES * sum(parameter.numel() for parameter in model.parameters()) + _MOMENT_BYTES * moved
    # While a checkpoint is written, the ones that it will replace are still there.
    require_free_space(config.directory, 2 * size, "Keeping the checkpoints of this run")
    return data


def _require_another_run(start: StartConfig, config: RunConfig) -> None:
    for run in (origin.run for origin in start.origins):
        if run is not None and run.resolve() == config.directory.resolve():
            raise ConfigError(
                f"start.run is {run}, this run itself, which has no checkpoint to begin from. Name the run that the "
                f"weights are to come from, or set start=null."
            )


def has_checkpoints(config: RunConfig) -> bool:
    """Whether the run has been begun, so that its weights come from its own checkpoints."""
    return bool(CheckpointStore(RunDirectory(config.directory).checkpoints, config.checkpoint.keep).steps())


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
