"""A run that moves between ranks and topologies, and one that goes astray on ranks: as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_scenarios
from harness import Ranks
from training_run import SEQ_LEN, STEP_TOKENS, TinyRun, build_shards

from rxt_dist.train.rollback import read_jumps

pytestmark = pytest.mark.distributed

ROWS = STEP_TOKENS // SEQ_LEN
PLAIN = ["parallel.engine=plain", "parallel.zero=0"]


def topology(zero: int, expert_parallel: int, micro_batch_rows: int = 2) -> list[str]:
    parallel = ["parallel.engine=deepspeed", f"parallel.zero={zero}", f"parallel.expert_parallel={expert_parallel}"]
    return [*parallel, f"train.micro_batch_rows={micro_batch_rows}"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


def made(folder: Path, shards: Path, steps: int) -> TinyRun:
    folder.mkdir()
    return TinyRun(folder, shards, steps)


def test_a_run_moves_from_ranks_to_ranks(tmp_path: Path, shards: Path, ranks: Ranks) -> None:
    """4 -> 2 -> 1 -> 4 ranks, with another ZeRO stage and another spread of experts each time."""
    lives = [(4, topology(3, 2), 1), (2, topology(1, 2), 3), (1, PLAIN, 5), (4, topology(2, 4), 0)]
    steps = 8
    moved, still = made(tmp_path / "moved", shards, steps), made(tmp_path / "still", shards, steps)
    for world, overrides, stop_at in lives:
        arguments = {"folder": str(moved.folder), "overrides": overrides, "stop_at": stop_at}
        for found in ranks.run(run_scenarios.live, world, shards=str(shards), steps=steps, **arguments):
            assert found["code"] == (76 if stop_at else 0)
            # A request is heard at the end of the next step.
            assert found["row"] == (stop_at + 1 if stop_at else steps) * ROWS
    ranks.run(run_scenarios.live, 1, folder=str(still.folder), shards=str(shards), steps=steps, overrides=PLAIN)
    assert [event["ranks"] for event in moved.events("start")] == [4, 2, 1, 4]
    assert len(moved.curve()) == steps
    for mine, wanted in zip(moved.curve(), still.curve(), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)


def test_a_run_that_goes_astray_on_ranks_goes_back(tmp_path: Path, shards: Path, ranks: Ranks) -> None:
    """And a kill between the note and the load loses nothing: the end is the same to the bit."""
    steps, window = 9, (6 * ROWS, 8 * ROWS)
    often = ["train.max_skipped_steps=2", f"checkpoint.every_tokens={3 * STEP_TOKENS}", "checkpoint.keep=3"]
    overrides = [*topology(1, 2, ROWS // 2), *often]
    common = {"shards": str(shards), "steps": steps, "poison": window, "overrides": overrides}
    checksums = []
    for name, interruptions in (("whole", [False]), ("killed", [True, False])):
        tiny = made(tmp_path / name, shards, steps)
        for interrupted in interruptions:
            lived = ranks.run(run_scenarios.live, 2, folder=str(tiny.folder), interrupted=interrupted, **common)
            assert {found["code"] for found in lived} == {-9 if interrupted else 0}
        (jump,) = read_jumps(tiny.directory / "jumps.json")
        assert (jump.to_step, jump.first, jump.end) == (3, 5 * ROWS, 8 * ROWS)
        assert [event["step"] for event in tiny.events("jump")] == [6, 7, 8]
        assert [event["reason"] for event in tiny.events("skip")] != []
        checksums.append(lived[0]["checksum"])
    assert checksums[0] == checksums[1]
