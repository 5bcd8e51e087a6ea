"""Saves in the background over ranks: bit-equal to those that training waits for, and whole or not there."""

from __future__ import annotations

import pytest
from background_scenarios import die_while_saving, one_rank_fails, save_both_ways

from rxt_dist.checkpoint.store import MANIFEST, CheckpointStore

pytestmark = pytest.mark.distributed


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


@pytest.mark.parametrize(
    "topology",
    [{"zero": 3, "expert_parallel": 2}, {"zero": 1, "precision": "bfloat16"}, {"zero": 0}, {"zero": 2}],
    ids=str,
)
def test_training_that_goes_on_changes_nothing_in_what_is_written(ranks, tmp_path, topology):
    results = ranks.run(save_both_ways, 2, directory=str(tmp_path), topology=topology)
    first = results[0]
    assert first["error"] == "None"
    assert first["saved"] == first["loaded"] != first["changed"]
    waited, written = (tmp_path / way / "step-00000002" for way in ("waited", "background"))
    assert contents(waited) == contents(written)
    assert len(contents(written)) == 3
    for result in results:
        (problem,) = result["rejected"]
        assert problem.startswith("rank-00001.safetensors: damaged")
    metas = [CheckpointStore(path.parent, 2).read(2).meta for path in (waited, written)]
    assert metas[0] == metas[1]


def test_the_failure_of_one_rank_commits_nothing_and_the_next_save_is_whole(ranks, tmp_path):
    results = ranks.run(one_rank_fails, 2, directory=str(tmp_path))
    (disk, text), (denied, reason), (fine, _) = results[0]["told"]
    assert disk == "DiskError"
    assert "failed on rank 1: OSError: [Errno 28] No space left on device" in text
    assert denied == "CheckpointError"
    assert "failed on rank 0: PermissionError" in reason
    assert fine == "NoneType"
    assert [said[0] for said in results[1]["told"]] == ["DiskError", "NoneType", "NoneType"]
    assert results[0]["left"] == [[], [], ["step-00000003"]]


@pytest.mark.parametrize("at", ["write", "record"])
def test_a_rank_that_dies_while_it_writes_leaves_no_checkpoint(ranks, tmp_path, at):
    with pytest.raises(FileNotFoundError):  # Both end without a result, as they should; a failure is told otherwise.
        ranks.run(die_while_saving, 2, directory=str(tmp_path), at=at)
    store = CheckpointStore(tmp_path, 2)
    assert list(store.steps()) == [1]
    newest = store.latest_valid(pytest.fail)
    assert newest is not None
    assert newest.step == 1
