"""Lengths of time as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_PARTS = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_SECONDS = (86400, 3600, 60, 1)
# Ten years: whoever writes more has slipped.
_MOST = 3660 * 86400


def seconds_of(text: str) -> int:
    """Seconds of `3h50m`, `90m`, `1d12h` or `45s`.

    Raises:
        ValueError: it is no such text, no time at all, or more than ten years.
    """
    found = _PARTS.fullmatch(text) if len(text) <= 32 else None
    seconds = sum(int(part or 0) * size for part, size in zip(found.groups(), _SECONDS, strict=True)) if found else 0
    if not 0 < seconds <= _MOST:
        raise ValueError(f"'{text[:32]}' is no length of time: write it as 3h50m, 90m, 1d12h or 45s")
    return seconds


def _checked(text: str) -> str:
    seconds_of(text)
    return text


Duration = Annotated[str, AfterValidator(_checked)]
