"""The order of a run, for verbs that speak of positions and epochs: made by the function that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config.run import DataConfig, RunConfig
    from rxt_dist.data.manifest import DatasetManifest
    from rxt_dist.data.mixture import PhaseDatasets
    from rxt_dist.data.sampler import GlobalOrder


def require_end(data: DataConfig, total_tokens: int | None, name: Path, advice: str) -> None:
    """Refuse to say how much is read where the last phase lasts until an end that nobody has told.

    Args:
        advice: how to tell it.
    """
    if total_tokens is None and data.mixture and data.mixture[-1].length is None:
        raise ConfigError(
            f"The last phase of {name} lasts until the end of training, which a data file does not know: {advice}."
        )


def order_of(
    dataset: Path, manifest: DatasetManifest, file: Path | None, seed: int | None
) -> tuple[GlobalOrder, PhaseDatasets, RunConfig | None]:
    """The order of a run file, of a data file, or (None) of a run that mixes all sources by their size.

    With it come the datasets that its phases read: `dataset` in place of data.path, and those that phases name.

    A run brings its seed and budget. Without one the seed is `seed` or 0, and the budget the phases' own, with one pass
    where they are open.
    The bound on repeats does not count here: it is for training to refuse a plan, and not a look at it.

    Raises:
        ConfigError: the file, a mixture that the dataset cannot serve, or a seed beside a run.
    """
    from rxt_dist.config.load import load_data, load_run
    from rxt_dist.config.run import DataConfig
    from rxt_dist.config.tree import Tree
    from rxt_dist.data.manifest import load_manifest
    from rxt_dist.data.mixture import PhaseDataset, phase_datasets, planned_order

    run = None
    data = DataConfig(path=dataset)
    if file is not None:
        values = Tree.read(file).values
        if isinstance(values, dict) and "train" in values:
            run = load_run(file)
        data = run.data if run else load_data(file)
    if run is not None and seed is not None and seed != run.seed:
        raise ConfigError(f"--seed is {seed}, but {file} is a run with seed {run.seed}: leave out --seed.")
    data = data.model_copy(update={"max_epochs": float("inf"), "path": dataset})
    read = phase_datasets(
        data, lambda path: PhaseDataset.of(path, manifest if path == dataset else load_manifest(path))
    )
    total = run.train.total_tokens if run else None
    run_seed = run.seed if run else seed or 0
    return planned_order(read, data, total, run_seed), read, run
