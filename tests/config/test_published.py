"""The run files and chains of configs/: all of them load, fit together, and can be planned without any data."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.config.chain import DataJob, load_chain
from rxt_dist.config.load import load_run
from rxt_dist.config.run import StartConfig
from rxt_dist.config.validate import settle_topology, validate_run
from rxt_dist.plan.run import plan_run

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))
CHAINS = sorted((CONFIGS / "chain").glob("*.yaml"))
STAGES = {
    "demo": ["joint", "sft", "memory", "smat"],
    "rxt-alpha-nano": ["joint", "sft", "memory", "smat"],
    "rxt-alpha-mini": ["mlm", "decoder", "decoder-sft", "memory", "smat"],
    "rxt-beta-micro": ["joint", "sft", "memory", "smat"],
    "rxt-beta": ["joint", "sft", "memory", "smat"],
}


def sizes(start: StartConfig | None) -> set[tuple[str, str]]:
    """(run, part) of all that is taken."""
    return {(str(origin.run), part) for origin in (start.origins if start else ()) for part in origin.parts}


@pytest.mark.slow
@pytest.mark.parametrize("file", RUNS, ids=lambda path: path.stem)
def test_a_run_can_be_planned_without_its_data(file: Path) -> None:
    config = load_run(file)
    assert config.name == file.stem
    settled = settle_topology(config, config.cluster.ranks)
    validate_run(settled, config.cluster.ranks, None)
    plan = plan_run(settled)
    assert plan["time"]["days_estimate"] > 0
    assert plan["settings"]["own_estimate"]["memory_bytes"] < plan["settings"]["gpu_memory_gb"] * 1e9
    steps = config.train.total_tokens / config.train.global_batch_tokens
    assert steps > 50, "a file says more than a few steps"
    assert config.checkpoint.every_tokens * 4 <= config.train.total_tokens or steps < 400


def test_there_is_a_chain_for_every_system() -> None:
    assert {path.stem for path in CHAINS} == set(STAGES)


@pytest.mark.parametrize("file", CHAINS, ids=lambda path: path.stem)
def test_a_chain_takes_its_runs_through_their_stages(file: Path) -> None:
    """And where a run file stands alone, it begins with the same weights of the same folders."""
    chain = load_chain(file)
    assert chain.name == f"{file.stem}-chain"
    assert [run.stage.kind for run in chain.runs.values()] == STAGES[file.stem] == list(chain.runs)
    assert len({run.model for run in chain.runs.values()}) == 1
    for link in chain.links:
        if isinstance(link.work, DataJob):
            continue
        alone = load_run(CONFIGS / "run" / f"{link.work.name}.yaml")
        assert alone.directory == link.work.directory
        # A part that several have alike, since it was frozen, is taken from the last of them.
        assert {part for _, part in sizes(link.work.start)} == {part for _, part in sizes(alone.start)}
        assert set(link.work.stage.expects()) <= {part for _, part in sizes(alone.start)}
        validate_run(settle_topology(link.work, link.work.cluster.ranks), link.work.cluster.ranks, None)
