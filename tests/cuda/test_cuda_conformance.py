"""Every number of the reference implementation, on the device: the tests of tests/model with their tensors there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import conformance
import pytest
import test_conformance as on_cpu
import torch
from safetensors.torch import load_file
from torch import Tensor

# Kernels sum in other orders than the CPU.
ALLOWED = 5e-5

# Their tests and fixtures are collected here too.
for _name, _value in vars(on_cpu).items():
    if _name.startswith("test_") or _name in ("model", "padding"):
        setattr(sys.modules[__name__], _name, _value)


@pytest.fixture(scope="module", autouse=True)
def _tensors_on_the_device(device: torch.device) -> Iterator[None]:
    @cache
    def vectors(name: str) -> dict[str, Tensor]:
        return load_file(conformance.DATA / f"{name}.safetensors", device=str(device))

    def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = ALLOWED) -> None:
        assert actual.device.type == device.type, f"{what} is on {actual.device}"
        conformance.assert_close(actual, expected, what, max(tolerance, ALLOWED))

    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(conformance, "vectors", vectors)
        patch.setattr(on_cpu, "vectors", vectors)
        patch.setattr(on_cpu, "assert_close", assert_close)
        yield
