"""An error of one rank while a life is set up ends all ranks with it, instead of leaving the others waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Ranks
from life_scenarios import begin_a_life
from training_run import TinyRun, build_shards

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("trouble", ["logs/rank-00001.log", "metrics.jsonl", "life.json", "lock"])
def test_what_one_rank_meets_ends_all(ranks: Ranks, shards: Path, tmp_path: Path, trouble: str) -> None:
    tiny = TinyRun(tmp_path, shards)
    if trouble != "lock":
        (tiny.directory / trouble).mkdir(parents=True)
    found = ranks.run(begin_a_life, 2, folder=str(tmp_path), shards=str(shards), trouble=trouble, deadline=30)
    assert found[0] == found[1]
    kind, text, common = found[0]
    assert (kind, common) == ("ConfigError", "True")
    assert ("is being trained by another process" if trouble == "lock" else trouble) in text
    assert trouble != "lock" or not tiny.directory.exists()
