"""The order of a run, for verbs that speak of positions and epochs: made by the function that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rxt_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rxt_dist.config.run import DataConfig, RunConfig
    from rxt_dist.data.dialogues import AnyManifest
    from rxt_dist.data.mixture import PhaseDataset, PhaseDatasets
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


def phase_dataset_of(path: Path, run: RunConfig | None, manifest: AnyManifest | None = None) -> PhaseDataset:
    """What phases read of a dataset of either kind. Of dialogues the stage of the run says how many turns count; one
    where there is no run, so that positions and passes are right but tokens are not.

    Raises:
        DataError: no such dataset, or documents where the run's stage reads dialogues, or the other way round.
    """
    from rxt_dist.data.dialogue_rows import dialogue_phase_dataset
    from rxt_dist.data.dialogues import DialogueManifest, load_any_manifest
    from rxt_dist.data.mixture import PhaseDataset

    manifest = manifest or load_any_manifest(path)
    turns = getattr(run.stage, "turns", None) if run else None
    is_dialogues = isinstance(manifest, DialogueManifest)
    if run is not None and is_dialogues != (turns is not None):
        holds, reads = ("dialogues", "rows") if is_dialogues else ("rows", "dialogues")
        raise DataError(f"{path} holds {holds}, but stage '{run.stage.kind}' of {run.name} reads {reads}.")
    if isinstance(manifest, DialogueManifest):
        return dialogue_phase_dataset(path, manifest, turns or 1)
    return PhaseDataset.of(path, manifest)


def order_of(
    dataset: Path, manifest: AnyManifest, file: Path | None, seed: int | None
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
    from rxt_dist.data.dialogues import DialogueManifest
    from rxt_dist.data.mixture import phase_datasets, planned_order

    run = None
    data = DataConfig(path=dataset)
    if file is not None:
        values = Tree.read(file).values
        if isinstance(values, dict) and "train" in values:
            run = load_run(file)
        data = run.data if run else load_data(file)
        if run is None and isinstance(manifest, DialogueManifest):
            raise ConfigError(
                f"{file} is a data file, which does not say how many turns of a dialogue a stage reads, and so not how "
                f"long a phase is: name the run file."
            )
    if run is not None and seed is not None and seed != run.seed:
        raise ConfigError(f"--seed is {seed}, but {file} is a run with seed {run.seed}: leave out --seed.")
    data = data.model_copy(update={"max_epochs": float("inf"), "path": dataset})
    read = phase_datasets(data, lambda path: phase_dataset_of(path, run, manifest if path == dataset else None))
    total = run.train.total_tokens if run else None
    run_seed = run.seed if run else seed or 0
    return planned_order(read, data, total, run_seed), read, run
