from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rxt_dist.data.packing import pack
from rxt_dist.data.rows import check_rows, row_sum


def test_a_token_in_the_padding_is_never_written(tmp_path: Path) -> None:
    rows = pack([np.array([11, 12], dtype=np.uint16)], [0], 16)
    rows.tokens_RT[0, 9] = 33
    with pytest.raises(AssertionError, match="after the last segment"):
        check_rows(rows, 900)


def test_the_checksum_of_a_row_can_never_change() -> None:
    """Every dataset holds it."""
    assert row_sum(np.array([2, 65_535, 3], np.uint16).data, np.array([3], np.uint16).data) == 8_734_322_432_844_490_753
