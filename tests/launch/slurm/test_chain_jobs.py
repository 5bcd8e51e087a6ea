"""A chain on a cluster, without SLURM: a job for each link that is left, each after the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import TinyRun

from launch.slurm import chain as module
from launch.slurm import client, submit
from launch.slurm.chain import ChainWish, render_chain, submit_chain
from launch.slurm.client import JobState
from launch.slurm.options import SlurmOptions
from launch.slurm.submit import Wish
from rxt_dist.config.chain import load_chain
from rxt_dist.errors import ConfigError

Submitted = list[tuple[str, ...]]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What sbatch was told (options by run), the states of jobs, and with what ranks a chain was checked."""
    queue: dict[str, Any] = {"submitted": [], "states": {}, "checked": [], "refused": None}

    def submitted(script: str, *options: str) -> str:
        run = Path(script).parents[2].name
        if run == queue["refused"]:
            raise ConfigError("not this one")
        queue["submitted"].append((run, *options))
        return str(100 + len(queue["submitted"]))

    def state(job: str, patience: float = 0.0) -> JobState | None:
        return JobState(queue["states"].get(job, "PENDING"))

    monkeypatch.setattr(client, "submit", submitted)
    monkeypatch.setattr(client, "job_state", state)
    monkeypatch.setattr(client, "there", lambda: True)
    monkeypatch.setattr(client, "binds_cpus", lambda: True)
    monkeypatch.setattr(submit, "check_script", lambda *arguments, **options: None)
    monkeypatch.setattr(submit, "_node_counts", lambda wish: [wish.options.nodes])
    monkeypatch.setattr(module, "check", lambda file, overrides, ranks: queue["checked"].append(ranks))
    return queue


@pytest.fixture
def wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChainWish]:
    monkeypatch.chdir(tmp_path)

    def make(**more: Any) -> ChainWish:
        run = TinyRun(tmp_path, tmp_path / "shards").content()
        kinds = ("joint", "sft", "memory")
        links: dict[str, Any] = {kind: {"run": run | {"name": kind, "stage": {"kind": kind}}} for kind in kinds}
        file = tmp_path / "chain.yaml"
        content = {"name": "chain", "output": str(tmp_path / "runs"), "links": more | links}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        options = SlurmOptions(nodes=2, gpus_per_node=2)

        def wanted(run: Any, after: list[Path]) -> Wish:
            cluster = run.cluster.model_copy(update={"nodes": 2, "gpus_per_node": 2})
            return Wish(run.model_copy(update={"cluster": cluster}), options, tuple(after))

        return ChainWish(file, [], load_chain(file), wanted)

    return make


def finish(wish: ChainWish, name: str) -> None:
    run = wish.chain.runs[name].directory
    (run / "checkpoints/step-00000003").mkdir(parents=True)
    (run / "finished.json").write_text(json.dumps({"step": 3}))


def waits(job: int) -> tuple[str, ...]:
    return (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")


def test_each_link_waits_for_the_one_before(wish: Callable[..., ChainWish], queue: dict[str, Any]) -> None:
    said: list[str] = []
    assert submit_chain(wish(), said.append) == ["101", "102", "103"]
    assert queue["submitted"] == [("joint",), ("sft", *waits(101)), ("memory", *waits(102))]
    assert queue["checked"] == [4]


def test_what_is_finished_or_has_a_job_is_left_alone(wish: Callable[..., ChainWish], queue: dict[str, Any]) -> None:
    wanted = wish()
    finish(wanted, "joint")
    submit_chain(wanted, lambda text: None)
    assert queue["submitted"] == [("sft",), ("memory", *waits(101))]
    # The first job failed, so that SLURM has cancelled the second.
    queue["states"] = {"101": "FAILED", "102": "CANCELLED"}
    submit_chain(wanted, lambda text: None)
    assert queue["submitted"][2:] == [("sft",), ("memory", *waits(103))]
    queue["states"] = {"103": "RUNNING"}
    said: list[str] = []
    assert submit_chain(wanted, said.append) == []
    assert said == ["link 'sft' has a job already", "link 'memory' has a job already"]


def test_a_link_that_is_refused_names_those_that_stay(wish: Callable[..., ChainWish], queue: dict[str, Any]) -> None:
    queue["refused"] = "sft"
    with pytest.raises(ConfigError, match=r"link 'sft': not this one Links before it stay submitted \(101\)"):
        submit_chain(wish(), lambda text: None)


def test_data_is_made_before(wish: Callable[..., ChainWish], queue: dict[str, Any], tmp_path: Path) -> None:
    wanted = wish(texts={"data": ["build"], "makes": str(tmp_path / "made")})
    with pytest.raises(ConfigError, match="link 'texts' makes data, which a training job does not"):
        submit_chain(wanted, lambda text: None)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_next_job_and_writes_nothing(
    wish: Callable[..., ChainWish], queue: dict[str, Any], tmp_path: Path
) -> None:
    told: list[str] = []
    assert "#SBATCH --job-name=joint-" in render_chain(wish(), told.append)
    assert told == ["link 'sft' would be submitted too, and wait", "link 'memory' would be submitted too, and wait"]
    assert not (tmp_path / "runs").exists()
    assert not queue["submitted"]
