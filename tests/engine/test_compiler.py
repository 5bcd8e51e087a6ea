"""Whether a run compiles: as it asks for, on GPUs by itself, and never without a compiler."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config

from rxt_dist.engine import build
from rxt_dist.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "device", "compiler", "expected"),
    [
        ("auto", CUDA, "gcc", True),
        ("auto", CUDA, None, False),
        ("auto", CPU, "gcc", False),
        ("on", CPU, "gcc", True),
        ("off", CUDA, "gcc", False),
    ],
)
def test_a_run_compiles_as_it_asks_for(
    asked: str, device: torch.device, compiler: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    config = run_config(compile=asked)
    assert build.compiles(config, device) is expected
    said = "\n".join(build.describe_kernels(run_config(compile=asked), CPU))
    assert ("not compiled" in said) is (asked != "on")


def test_a_run_that_must_compile_and_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(ConfigError, match="no C compiler"):
        build.compiles(run_config(compile="on"), CUDA)
