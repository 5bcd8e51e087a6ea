"""The protocol between a training and whatever starts it."""

from __future__ import annotations

from rxt_dist.errors import ExitCode, may_start_again


def test_what_the_next_life_would_meet_again_is_final() -> None:
    """As docs/errors.md says; codes that are not ours (a traceback, a signal) are crashes."""
    final = {code for code in ExitCode if not may_start_again(code)}
    assert final == {0, 64, 65, 71, 74, 76, 86, 93}
    assert all(may_start_again(code) for code in (1, 69, 75, 87, 130, 137))
