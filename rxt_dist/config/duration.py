"""Lengths of time as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SECONDS = (86400, 3600, 60, 1)


def seconds_of(text: str) -> int:
    """Seconds of `3h50m`, `90m`, `1d12h` or `45s`.

    Raises:
        ValueError: it is no such text, or no time at all.
    """
    found = _PARTS.fullmatch(text) if len(text) <= 32 else None
    seconds = sum(int(part or 0) * size for part, size in zip(found.groups(), _SECONDS, strict=True)) if found else 0
    if not seconds:
        raise ValueError(f"'{text[:32]}' is no length of time: write it as 3h50m, 90m, 1d12h or 45s")
    return seconds


def _checked(text: str) -> str:
    seconds_of(text)
    return text


Duration = Annotated[str, AfterValidator(_checked)]
