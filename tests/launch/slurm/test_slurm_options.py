"""Options of a job: what may stand in a script, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.slurm.options import SlurmOptions, array_options
from rxt_dist.config.load import load_settings
from rxt_dist.errors import ConfigError


def options(**given: Any) -> SlurmOptions:
    return load_settings(SlurmOptions, None, given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("account", "me; rm -rf /"),
        ("qos", ""),
        ("constraint", "a b"),
        ("exclude", "gpu[1-2] gpu3"),
        ("time", "1:00:00"),
        ("mem", "lots"),
        ("gpu_type", "a100:8"),
        ("gres", "gpu 8"),
        ("cpu_bind", "--help"),
        ("modules", ["cuda; reboot"]),
        ("conda", "a\nb"),
        ("env", {"A-B": "1"}),
        ("env", {"A": "1\nexport B=2"}),
        ("sbatch", ["mail"]),
        ("sbatch", ["--mail-type=FAIL\n#SBATCH --nodes=9"]),
        ("sbatch", ["--nodes=9"]),
        ("sbatch", ["-N 9"]),
        ("sbatch", ["--export=NONE"]),
        # sbatch takes the beginning of an option's name for it, and a rank must see all GPUs of its node.
        ("sbatch", ["--node=9"]),
        ("sbatch", ["--outp=x"]),
        ("sbatch", ["--gpus-per-task=1"]),
        ("sbatch", ["--gpu-bind=single:1"]),
        ("sbatch", ["--distribution=cyclic"]),
        ("sbatch", ["-m cyclic"]),
        ("sbatch", ["--wait"]),
        ("sbatch", ["-W"]),
        ("sbatch", ["--test-only"]),
        ("sbatch", ["--clusters=other"]),
        ("nodes", 0),
        ("nodes", 10**6),
        ("signal", "TERM"),
        ("launcher", "mpirun"),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused_by_its_option(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"option --{name.replace('_', '-')}") as refused:
        options(**{name: value})
    assert "\n" not in str(refused.value)


def test_what_clusters_ask_for_is_taken() -> None:
    taken = options(
        partition="gpu,gpu-long", account="plgrid-gpu-a100", constraint="a100&(nvlink|hgx)", exclude="gpu[007-012],x3",
        time="1d12h", mem="480G", gres="gpu:a100:8", modules=["cuda/12.4.1"], env={"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1"},
        sbatch=["--mail-type=FAIL,END", "--reservation=maint x", "--gres-flags=enforce-binding", "--hold"],
        cpu_bind="mask_cpu:0xff,0xff00",
    )  # fmt: skip
    assert taken.seconds == 36 * 3600


def test_the_line_of_an_option_that_the_launcher_has_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"--nodes is the launcher's to set: use --nodes"):
        options(sbatch=["--nodes=9"])
    with pytest.raises(ConfigError, match=r"--output is the launcher's to set\."):
        options(sbatch=["--output=x"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_nodes": 3, "nodes": 2}, "min_nodes"),
        ({"chain": 3}, "--no-requeue"),
        ({"conda": "a", "venv": "b"}, "conda and venv"),
        ({"mounts": ["/data"]}, "container"),
        ({"gres": "gpu:a100:8", "gpu_type": "a100"}, "gpu_type"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(**given)


def test_a_site_file_states_defaults_and_options_count_before_it(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: gpu\naccount: mine\nenv: {NCCL_IB_HCA: mlx5}\n")
    read = load_settings(SlurmOptions, site, {"account": "other", "nodes": 4})
    assert (read.partition, read.account, read.nodes, read.env) == ("gpu", "other", 4, {"NCCL_IB_HCA": "mlx5"})
    site.write_text("partitoin: gpu\n")
    with pytest.raises(ConfigError, match=r"site.yaml:1: unknown key 'partitoin'. Did you mean 'partition'"):
        load_settings(SlurmOptions, site, {})


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads what stands in a site file."""
    monkeypatch.setenv("HOME", "/home/me")
    assert options(venv="~/env").venv == "/home/me/env"
    taken = options(conda="~/envs/rxt", container="~/rxt.sif", mounts=["~/data:/data", "/x"])
    assert (taken.conda, taken.container) == ("/home/me/envs/rxt", "/home/me/rxt.sif")
    assert taken.mounts == ("/home/me/data:/data", "/x")


def test_an_array_has_tasks_and_what_a_site_states_for_all_jobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tasks' is missing"):
        array_options(None, {})
    site = tmp_path / "site.yaml"
    site.write_text("account: mine\npartition: gpu\ngpu_type: a100\ncpus_per_task: 16\nmodules: [cuda/12]\n")
    options = array_options(site, {"tasks": 64, "partition": "cpu"})
    assert (options.tasks, options.account, options.partition, options.modules) == (64, "mine", "cpu", ("cuda/12",))
    assert options.cpus_per_task == 8, "those of ranks are no workers"
