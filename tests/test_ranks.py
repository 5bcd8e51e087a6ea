"""Rank facts from torchrun's and SLURM's environments."""

from __future__ import annotations

import pytest

from rxt_dist.errors import ConfigError
from rxt_dist.ranks import Ranks, export_ranks, first_host, read_ranks

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
JOB = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu[07-09,12]"}


def test_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert read_ranks(torchrun | SLURM) == Ranks(1, 2, 0)
    assert read_ranks(SLURM) == Ranks(5, 8, 1)
    assert read_ranks({}) == Ranks(0, 1, 0)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK is missing"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict each other"),
    ],
)
def test_a_broken_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_ranks(environ)


def test_slurm_ranks_agree_on_an_address_that_changes_with_every_life() -> None:
    first, other = dict(JOB), dict(JOB)
    export_ranks(Ranks(5, 8, 1), first)
    export_ranks(Ranks(0, 8, 0), other)
    assert (first["RANK"], first["WORLD_SIZE"], first["LOCAL_RANK"]) == ("5", "8", "1")
    assert first["MASTER_ADDR"] == other["MASTER_ADDR"] == "gpu07"
    assert first["MASTER_PORT"] == other["MASTER_PORT"]
    requeued = JOB | {"SLURM_RESTART_COUNT": "1"}
    export_ranks(Ranks(0, 8, 0), requeued)
    assert requeued["MASTER_PORT"] != first["MASTER_PORT"]


def test_an_address_that_is_set_stays() -> None:
    environ = JOB | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    export_ranks(Ranks(0, 8, 0), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("head", "1234")


def test_ranks_without_a_meeting_place_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot find each other"):
        export_ranks(Ranks(0, 2, 0), {})
    alone: dict[str, str] = {}
    export_ranks(Ranks(0, 1, 0), alone)
    assert alone["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[007-012,020],login1", "gpu007"), ("a,b", "a"), ("n1", "n1"), ("r[1-2]n[1-4]", "r1n1"), ("x[3]-ib", "x3-ib")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MASTER_PORT", "tcp", "MASTER_PORT is 'tcp' in the environment, but must be a whole number"),
        ("MASTER_PORT", "", "MASTER_PORT is ''"),
        ("MASTER_PORT", "-1", "MASTER_PORT is '-1'"),
        ("MASTER_PORT", "0", "MASTER_PORT is 0, but a port lies between 1 and 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536"),
        ("SLURM_JOB_ID", "12_4", "SLURM_JOB_ID is '12_4'"),
        ("SLURM_RESTART_COUNT", "two", "SLURM_RESTART_COUNT is 'two'"),
    ],
)
def test_what_should_be_a_number_is_refused_by_its_name(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export_ranks(Ranks(0, 8, 0), JOB | {name: value})
