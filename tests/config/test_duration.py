"""Lengths of time as people write them."""

from __future__ import annotations

import pytest

from rxt_dist.config.duration import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13_800), ("45s", 45), ("90m", 5400), ("1d12h", 129_600), ("1h1s", 3601)]
)
def test_what_people_write(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "3", "0m", "50m3h", "3:50:00", "-1h", "1.5h", "1h ", "9" * 5000 + "h", "9" * 20 + "d", "٣h"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 3h50m"):
        seconds_of(text)
