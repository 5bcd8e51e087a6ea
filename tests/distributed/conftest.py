"""One server of gloo ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Ranks

# Imported once, before ranks are forked. The others import what no rank of a run does, and ranks' memory is measured.
_SCENARIOS = ("scenarios", "background_scenarios", "health_scenarios", "memory_scenarios", "resume_scenarios")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"), *_SCENARIOS)
    yield server
    server.close()
