"""One flipped bit in any file of a run or its data: the run goes on as if it were not there, or names the file."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from training_run import TinyRun, build_shards

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.errors import ExitCode, UserError
from rxt_dist.ranks import Ranks
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.rollback import Jump, write_jumps
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

STEPS, HALF = 9, 6
# Rows that no step of this run reads: a window that changes nothing.
BEYOND = Jump(10**6, 10**6 + 8, to_step=10**5, step=10**5, lr=1e-3, clip=1.0, reason="a test")
MEND = (ExitCode.CONFIG, ExitCode.DATA)


def live(tiny: TinyRun) -> ExitCode:
    config = load_run(tiny.file)
    with StopRequest(tiny.directory / "STOP") as stop:
        return train(config, Ranks(0, 1, 0), stop)


def checksum(tiny: TinyRun) -> int:
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    assert store.steps()[-1] == STEPS
    return int(store.read(STEPS).meta["state_checksum"])


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, int]:
    """A run that was stopped in its middle with all files that one can have, and the checksum of its end."""
    folder = tmp_path_factory.mktemp("half")
    tiny = TinyRun(folder, build_shards(folder / "data"), STEPS)
    line = Reporter.line

    def told(reporter, position, *arguments):
        line(reporter, position, *arguments)
        if position.step == HALF:
            (tiny.directory / "STOP").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "line", told)
        assert live(tiny) == ExitCode.STOPPED
    write_jumps(tiny.directory / "jumps.json", [BEYOND])
    (tiny.directory / "finished.json").write_text('{"step": 3, "tokens": 1536, "training_hash": "x"}')
    return tiny, checksum(copied(half_run=tiny, folder=folder / "whole", finish=True))


def copied(half_run: TinyRun, folder: Path, finish: bool = False) -> TinyRun:
    shutil.copytree(half_run.folder, folder, ignore=shutil.ignore_patterns("whole"))
    tiny = TinyRun(folder, folder / "data/shards", STEPS)
    if finish:
        assert live(tiny) == ExitCode.DONE
    return tiny


CHECKPOINT = ("manifest.json", "rank-*", "routing*")
RUN = (
    "config.resolved.yaml",
    "environment.json",
    "life.json",
    "finished.json",
    "jumps.json",
    "metrics.jsonl",
    "events.jsonl",
)
DATA = ("dataset.json", "tokenizer.json", "*/train/*.arrow", "*/train/*.sums")
FILES = (
    *(f"runs/tiny/checkpoints/step-*/{name}" for name in CHECKPOINT),
    "runs/tiny/checkpoints/latest",
    *(f"runs/tiny/{name}" for name in RUN),
    *(f"data/shards/{name}" for name in DATA),
)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_bit(half: tuple[TinyRun, int], tmp_path: Path, pattern: str) -> None:
    stopped, wanted = half
    tiny = copied(stopped, tmp_path / "run")
    chance = random.Random(pattern)
    struck = max(tiny.folder.glob(pattern))
    content = bytearray(struck.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    struck.write_bytes(content)
    refusal: UserError | None = None
    try:
        assert live(tiny) == ExitCode.DONE
    except UserError as error:
        refusal = error
    if refusal is None:
        assert checksum(tiny) == wanted
    else:
        assert refusal.exit_code in MEND
        assert struck.name in str(refusal)
