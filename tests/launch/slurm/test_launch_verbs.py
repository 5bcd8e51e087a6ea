"""The verbs `launch slurm` and `slurm-data`: every option of the command arrives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import TinyRun
from typer.testing import CliRunner

from launch.commands import app
from launch.slurm import array, follow, submit
from launch.slurm.options import ArrayOptions, JobOptions, SlurmOptions
from launch.slurm.submit import Wish
from rxt_dist.errors import ConfigError

# Of each key its option, as a person writes it, and the value that it stands for; none is the default.
JOB: dict[str, tuple[list[str], Any]] = {
    "partition": (["--partition", "gpu"], "gpu"),
    "account": (["--account", "a"], "a"),
    "qos": (["--qos", "q"], "q"),
    "constraint": (["--constraint", "c"], "c"),
    "exclude": (["--exclude", "x[1-2]"], "x[1-2]"),
    "time": (["--time", "2h"], "2h"),
    "mem": (["--mem", "9G"], "9G"),
    "modules": (["--module", "a/1", "--module", "b"], ("a/1", "b")),
    "venv": (["--venv", "/v"], "/v"),
    "env": (["--env", "A=b=c", "--env", "D="], {"A": "b=c", "D": ""}),
    "sbatch": (["--sbatch=--mail-type=FAIL", "--sbatch=--hold"], ("--mail-type=FAIL", "--hold")),
    "conda": ([], None),
}
TRAINING: dict[str, tuple[list[str], Any]] = {
    **JOB,
    "nodes": (["--nodes", "4"], 4),
    "min_nodes": (["--min-nodes", "3"], 3),
    "gpus_per_node": (["--gpus-per-node", "2"], 2),
    "gpu_type": (["--gpu-type", "a100"], "a100"),
    "gres": ([], None),
    "cpus_per_task": (["--cpus-per-task", "3"], 3),
    "exclusive": (["--exclusive"], True),
    "cpu_bind": (["--cpu-bind", "none"], "none"),
    "signal": (["--signal", "HUP"], "HUP"),
    "signal_lead": (["--signal-lead", "9m"], "9m"),
    "requeue": (["--no-requeue"], False),
    "chain": (["--chain", "5"], 5),
    "launcher": (["--launcher", "torchrun"], "torchrun"),
    "container": (["--container", "/i.sif"], "/i.sif"),
    "container_runtime": (["--container-runtime", "pyxis"], "pyxis"),
    "mounts": (["--mount", "/a", "--mount", "/b:/c"], ("/a", "/b:/c")),
    "preflight": (["--no-preflight"], False),
}
ARRAY: dict[str, tuple[list[str], Any]] = {
    **JOB,
    "tasks": (["--tasks", "7"], 7),
    "at_once": (["--at-once", "2"], 2),
    "cpus_per_task": (["--cpus-per-task", "3"], 3),
}


def told(*arguments: str) -> Any:
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(TinyRun(tmp_path, tmp_path / "shards").file)


def test_every_option_of_a_training_arrives(run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRAINING.keys() == SlurmOptions.model_fields.keys(), "a new key needs an option, and a line here"
    wishes: list[Wish] = []
    monkeypatch.setattr(submit, "render", lambda wish, warn: wishes.append(wish) or "the script\n")
    options = [word for words, _ in TRAINING.values() for word in words]
    done = told(
        "slurm",
        run_file,
        *options,
        "--after",
        "runs/first",
        "--after",
        "second",
        "--from",
        "step-5",
        "--time-limit",
        "1h",
        "--dry-run",
    )
    assert (done.exit_code, done.stdout) == (0, "the script\n")
    (wish,) = wishes
    assert {name: getattr(wish.options, name) for name in TRAINING} == {
        name: value for name, (_, value) in TRAINING.items()
    }
    assert (wish.after, wish.from_checkpoint) == ((Path("runs/first"), Path("second")), "step-5")
    assert (wish.config.cluster.nodes, wish.config.cluster.gpus_per_node) == (4, 2)
    assert wish.config.train.time_limit == "1h"
    assert told("slurm", run_file, "--conda", "c", "--gres", "gpu:1", "--dry-run").exit_code == 0
    assert (wishes[1].options.conda, wishes[1].options.gres) == ("c", "gpu:1")
    assert (wishes[1].options.nodes, wishes[1].options.requeue, wishes[1].options.preflight) == (1, True, True)


def test_of_nodes_the_option_counts_then_the_site_then_the_run(
    run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes: list[Wish] = []
    monkeypatch.setattr(submit, "render", lambda wish, warn: wishes.append(wish) or "")
    site = tmp_path / "site.yaml"
    site.write_text("nodes: 3\nrequeue: false\n")
    cluster = "cluster={nodes: 2, gpus_per_node: 4}"
    for words in ([], ["--site", str(site)], ["--site", str(site), "--nodes", "5"]):
        told("slurm", run_file, cluster, *words, "--dry-run")
    assert [(wish.options.nodes, wish.options.gpus_per_node) for wish in wishes] == [(2, 4), (3, 4), (5, 4)]
    assert [wish.config.cluster.ranks for wish in wishes] == [8, 12, 20]
    assert [wish.options.requeue for wish in wishes] == [True, False, False]


def test_a_launch_says_how_to_follow_it_and_follows_it(run_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "submit", lambda wish, say: ["7", "8"])
    monkeypatch.setattr(follow, "follow_run", lambda run: 93)
    done = told("slurm", run_file, "--no-requeue", "--chain", "2")
    assert done.exit_code == 0
    assert "submitted: jobs 7, 8, one after the other" in done.stdout
    assert "rxt-dist launch status" in done.stdout
    assert told("slurm", run_file, "--follow").exit_code == 93
    with pytest.raises(ConfigError, match=r"--env is 'A', but it has the form NAME=VALUE"):
        told("slurm", run_file, "--env", "A")


def test_every_option_of_an_array_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ARRAY.keys() == ArrayOptions.model_fields.keys()
    assert JOB.keys() == JobOptions.model_fields.keys()
    data = tmp_path / "data.yaml"
    build = {"sources": [{"name": "web", "inputs": ["corpus"]}]}
    data.write_text(yaml.safe_dump({"path": "web", "seq_len": 64, "build": build}))
    wishes: list[array.ArrayWish] = []
    monkeypatch.setattr(array, "render_array", lambda wish, warn: wishes.append(wish) or "")
    options = [word for words, _ in ARRAY.values() for word in words]
    assert told("slurm-data", str(data), "build.unit_mb=64", *options, "--dry-run").exit_code == 0
    assert {name: getattr(wishes[0].options, name) for name in ARRAY} == {
        name: value for name, (_, value) in ARRAY.items()
    }
    assert wishes[0].config.build is not None
    assert wishes[0].config.build.unit_mb == 64
