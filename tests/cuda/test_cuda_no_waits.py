"""The host never waits for the device inside forward and backward, and once in a step: to read its losses."""

from __future__ import annotations

import pytest
import torch
from place import DRY
from steps import engine_on, prepared, train
from tiny import model_config, packed_batch
from waits import count_waits, no_waits, take_paths_of_cuda

from rxt_dist.losses import objective


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        take_paths_of_cuda(monkeypatch)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", ["global", "local"])
def test_forward_and_backward(bias: str, recompute: bool, device: torch.device) -> None:
    stage, _ = prepared(model=model_config(f"decoder.moe.bias={bias}"), recompute=recompute)
    stage = stage.to(device, torch.bfloat16)
    micro = stage.prepare(packed_batch(), 0)
    counts_J, weights_J = stage.counts(micro).float().to(device), stage.weights().to(device)
    load_ME = torch.full((3, 8), 1 / 8, device=device)
    moved = micro.to(device)
    # The first pass loads kernels and takes workspaces.
    objective(stage(moved, load_ME).sums_J, counts_J, weights_J).backward()
    with no_waits(device):
        output = stage(moved, load_ME)
        objective(output.sums_J, counts_J, weights_J).backward()
    assert bool(torch.isfinite(output.sums_J).all())


def _in_backward(values: torch.Tensor) -> None:
    doubled = values.clone().requires_grad_() * 2
    doubled.register_hook(lambda gradient: gradient * gradient.sum().item())
    doubled.sum().backward()


WAITS = {
    "a value": lambda values: values.sum().item(),
    "a mask": lambda values: values[values > 0],
    "a length": lambda values: values.repeat_interleave(values.long()),
    "in backward": _in_backward,
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noticed(name: str, device: torch.device) -> None:
    values = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match=r"wait|synchronizing"), no_waits(device):
        WAITS[name](values)


@pytest.mark.skipif(DRY, reason="only a GPU counts its waits")
def test_a_step_waits_once(device: torch.device) -> None:
    with engine_on(device, engine="plain", zero=0, precision="bfloat16") as (engine, stage):
        train(engine, stage, range(2))
        waits = count_waits(lambda: train(engine, stage, [2]))
    assert len(waits) == 1, waits
