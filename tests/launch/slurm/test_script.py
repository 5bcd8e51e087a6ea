"""Job scripts, held against files that a person has read; bash and shellcheck read them too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.slurm.options import ArrayOptions, SlurmOptions
from launch.slurm.script import Place, array_script, closing_script, run_script, slurm_time

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place(
    Path("/work/me/runs/beta/job/0001"), Path("/work/me"), Path("/work/me/runs/beta/job/code-0a1b"), "/env/python"
)
PLAIN = SlurmOptions(nodes=8, gpus_per_node=8)
EVERYTHING = SlurmOptions(
    nodes=8, min_nodes=6, gpus_per_node=8, gpu_type="a100", partition="gpu", account="plg-a100", qos="long",
    constraint="a100&nvlink", exclude="gpu[007-012]", time="1d12h", mem="0", cpus_per_task=16, exclusive=True,
    signal="USR1", requeue=False, chain=3, modules=("cuda/12.4", "gcc/13"), conda="it's mine",
    env={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "QUOTED": "a 'b'"}, sbatch=("--mail-type=FAIL",),
)  # fmt: skip
ARRAY = ArrayOptions(tasks=64, at_once=16, venv="/env")
SCRIPTS = {
    "plain.sbatch": run_script("beta-1a2b3c4d", PLAIN, 300, PLACE),
    "everything.sbatch": run_script("beta-1a2b3c4d", EVERYTHING, 600, PLACE),
    "array.sbatch": array_script("data-web", ARRAY, PLACE, ["build", "/work/me/web.job/0001", "8", "64"]),
    "close.sbatch": closing_script("data-web", ARRAY, PLACE, ["close", "/work/me/web.job/0001", "8", "data/web"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_the_one_that_was_read(name: str) -> None:
    assert SCRIPTS[name] == (GOLDEN / name).read_text(), "read the difference, then write the file anew"


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / name)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    # What is sourced lies on the cluster.
    subprocess.run(["shellcheck", "--exclude=SC1091", str(GOLDEN / name)], check=True)


def test_values_reach_the_job_as_they_are(tmp_path: Path) -> None:
    """Through bash, whatever they consist of."""
    script = run_script("x", PLAIN.model_copy(update={"env": {"ODD": """a 'b' "c" $d `e` \\ #f"""}}), 60, PLACE)
    exports = "\n".join(line for line in script.splitlines() if line.startswith("export ODD"))
    shown = subprocess.run(["bash", "-c", f'{exports}\nprintf %s "$ODD"'], capture_output=True, text=True, check=True)
    assert shown.stdout == """a 'b' "c" $d `e` \\ #f"""


@pytest.mark.parametrize(("seconds", "text"), [(59, "0-00:00:59"), (90_061, "1-01:01:01"), (36 * 3600, "1-12:00:00")])
def test_time_limits(seconds: int, text: str) -> None:
    assert slurm_time(seconds) == text
