"""What is made of the answers of SLURM's commands, and of those that do not answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import client
from launch.slurm.client import NodeKind, SlurmError
from rxt_dist.errors import ConfigError

Command = Callable[[str, str], Path]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Puts a command of SLURM into the PATH: the name, and what it does."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, code: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
        return path

    return make


def test_sinfo_is_understood(command: Command) -> None:
    lines = "gpu*|1-00:00:00|4|64|gpu:a100:8(S:0-1)\\ncpu|infinite|9|32+|(null)\\nshort|30:00|2|16|gpu:4,nvme:1\\n"
    command("sinfo", f"printf '{lines}'")
    assert client.node_kinds() == [
        NodeKind("gpu", True, 86400.0, 4, 64, 8),
        NodeKind("cpu", False, float("inf"), 9, 32, 0),
        NodeKind("short", False, 1800.0, 2, 16, 4),
    ]


def test_hidden_partitions_are_asked_for_and_torn_answers_left_out(command: Command) -> None:
    command("sinfo", 'case " $* " in *" -a "*) printf "hidden|1:00:00|2|8|(null)\\ngpu|1-00\\nslurm_load: x\\n";; esac')
    assert [kind.partition for kind in client.node_kinds()] == ["hidden"]


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:3090:8", 8),
        ("gpu:2080ti:4(S:0,2-3)", 4),
        ("gpu:1g.5gb:7", 7),
        ("gpu:a100:4,gpu:h100:4,nvme:2", 8),
        ("nvme:1,gpu:2(IDX:0-1)", 2),
        ("gpu:a100", 1),
        ("none", 0),
        ("(null)", 0),
        ("", 0),
        ("mps:100", 0),
    ],
)
def test_gpus_of_every_type_are_counted(gres: str, gpus: int) -> None:
    assert client.gpus_of(gres) == gpus


def test_the_id_is_found_behind_what_a_site_says(command: Command) -> None:
    command("sbatch", "echo 'Welcome to Alps 3000'; echo '--> valid account...OK'; echo '4711;alps'")
    assert client.submit("x") == "4711"
    command("sbatch", "echo 'Welcome'")
    with pytest.raises(SlurmError, match="Welcome"):
        client.submit("x")


def test_a_controller_that_is_away_refuses_nothing(command: Command) -> None:
    command("sbatch", "echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(SlurmError, match="Unable to contact"):
        client.would_start("x")
    command("sbatch", "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1")
    with pytest.raises(ConfigError, match="would never start"):
        client.would_start("x")


def test_a_controller_that_comes_back_is_asked_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.01)
    said = "slurm_load_jobs error: Zero Bytes were transmitted or received"
    answer = f"[ -e {tmp_path}/back ] && echo 'RUNNING|None|gpu1|now' && exit"
    command("squeue", f"{answer}; touch {tmp_path}/back; echo '{said}' >&2; exit 1")
    state = client.job_state("7", patience=5)
    assert state is not None
    assert state.state == "RUNNING"


def test_what_a_script_states_counts_before_the_variables_of_a_person(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch prefers variables to the lines of a script."""
    command("sbatch", f"/usr/bin/env | grep ^SBATCH_ >{tmp_path}/seen; echo 5")
    script = tmp_path / "script"
    script.write_text("#!/bin/bash\n#SBATCH --time=1-00:00:00\n#SBATCH --partition=gpu\n#SBATCH --requeue\nexec x\n")
    for name in ("TIMELIMIT", "PARTITION", "NO_REQUEUE", "WAIT", "ACCOUNT", "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    client.submit(str(script))
    assert sorted((tmp_path / "seen").read_text().split()) == ["SBATCH_ACCOUNT=1", "SBATCH_RESERVATION=1"]
    client.would_start(str(script))
    assert sorted((tmp_path / "seen").read_text().split()) == ["SBATCH_ACCOUNT=1", "SBATCH_RESERVATION=1"]


def test_nobody_knows_how_a_job_ended_where_no_accounts_are_kept(command: Command) -> None:
    command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.last_state("7") is None
    command("scontrol", "echo 'JobId=7 JobName=x JobState=CANCELLED Reason=None'")
    assert client.last_state("7") == "CANCELLED"
    command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert client.last_state("7") == "CANCELLED"
    command("sacct", "echo 'CANCELLED by 1000'")
    assert client.last_state("7") == "CANCELLED"


def test_a_job_that_the_queue_does_not_know_is_none(command: Command) -> None:
    command("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.job_state("7") is None
    command("squeue", "true")
    assert client.job_state("7") is None


def test_of_an_array_the_job_that_has_not_ended_counts(command: Command) -> None:
    command("squeue", "printf 'COMPLETED|None|gpu01|N/A\\nRUNNING|None|gpu02|N/A\\n'")
    assert client.active_state("7") == "RUNNING"
    command("squeue", "printf 'FAILED|None|gpu01|N/A\\nCOMPLETED|None|gpu02|N/A\\n'")
    assert client.active_state("7") is None
    state = client.job_state("7")
    assert state is not None
    assert state.state == "FAILED"
    command("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.active_state("7") is None


def test_a_slow_command_is_given_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SECONDS", 0.05)
    command("squeue", "exec sleep 5")
    with pytest.raises(SlurmError, match=r"timed out after 0\.05 s"):
        client.job_state("7")
