"""One server of gloo ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Ranks

# Imported once, before ranks are forked.
_SCENARIOS = sorted(path.stem for path in Path(__file__).parent.glob("*scenarios.py"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"), *_SCENARIOS)
    yield server
    server.close()
