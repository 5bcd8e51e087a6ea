"""What ranks tell each other: JSON, errors, and messages of threads."""

from __future__ import annotations

import json
import math

import collective_scenarios
import pytest
from harness import Ranks

pytestmark = pytest.mark.distributed

with pytest.raises(ValueError, match="JSON") as refused:
    json.dumps(math.nan, allow_nan=False)
# Python 3.12 names the value, and 3.11 does not.
NO_JSON = str(refused.value)


def test_all_ranks_hear_the_same(ranks: Ranks) -> None:
    values = [{"rank": rank, "text": "ż" * rank, "none": None} for rank in range(3)]
    for found in ranks.run(collective_scenarios.talk, 3):
        assert found["values"] == values
        assert found["flags"] == [True, False, True]
        assert found["total"] == 3 * 200
        assert found["heard"] == ["rank 0", "rank 1", "rank 2"]
        # 127.0.0.1 alone: nobody outside reaches the store.
        assert found["ports"] == ["0100007F"]


@pytest.mark.parametrize(
    ("kind", "others", "own"),
    [
        ("user", ["CheckpointError", "no such step"], ["CheckpointError", "no such step"]),
        ("bug", ["RuntimeError", "rank 1 failed: ValueError: a slip"], ["ValueError", "a slip"]),
        ("no JSON", ["RuntimeError", f"rank 1 failed: ValueError: {NO_JSON}"], ["ValueError", NO_JSON]),
    ],
)
def test_an_error_of_one_rank_ends_all(kind: str, others: list[str], own: list[str], ranks: Ranks) -> None:
    assert ranks.run(collective_scenarios.fail_together, 3, kind=kind) == [others, own, others]
