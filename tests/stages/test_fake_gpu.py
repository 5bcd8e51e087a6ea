"""The forward pass as a GPU would run it, on a machine without one: shapes, types, devices, no wait for the device.

torch's fake tensors have a device and no values. Code that asks for a value (`item`, `tolist`) or for a shape that
depends on values fails, as does an operation on tensors of two devices, and kernels are chosen as on CUDA. A torch
without CUDA lets neither backward nor Python's indexing run on them, nor CUDA's generators: indices are translated
here, noise is left out, and the cross-entropy, which writes into given buffers, is replaced. tests/cuda runs all that.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

import extended  # noqa: F401  (stages that only tests have)
import pytest
import torch
from tiny import batch_for, dialogue_batch, make_stage, model_config, packed_batch, run_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_dist.config.stages import STAGES
from rxt_dist.losses import StageOutput
from rxt_dist.model import experts, heads
from rxt_dist.model.cross_entropy import IGNORE, ClassifierSums
from rxt_dist.stages import memory
from rxt_dist.stages.base import Stage

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class Indexing(TorchFunctionMode):
    """`t[...]` and `t[...] = x` as the operators that Python's own indexing would call."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            return _at(*args)
        if function is Tensor.__setitem__ and isinstance(args[1], Tensor):
            return aten.index_put_(args[0], [args[1]], args[2])
        return function(*args, **(kwargs or {}))


def _at(tensor: Tensor, index: Any) -> Tensor:
    dim, lists = 0, {}
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, int):
            tensor, dim = tensor.select(dim, one), dim - 1
        elif isinstance(one, slice):
            tensor = aten.slice(tensor, dim, one.start, one.stop, one.step or 1)
        else:
            lists[dim] = one
        dim += 1
    return aten.index(tensor, [lists.get(dim) for dim in range(max(lists) + 1)]) if lists else tensor


class Called(TorchDispatchMode):
    """The names of all operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def forward(precision: torch.dtype, *overrides: str) -> tuple[StageOutput, set[str]]:
    """A forward pass of the joint stage on a fake GPU, and the operators it called."""
    stage = make_stage(run_config(model=model_config(*overrides))).to(precision)
    mode = FakeTensorMode()
    return on_gpu(mode, stage, moved(mode, stage.prepare(packed_batch(), None)))


def on_gpu(mode: FakeTensorMode, stage: Stage, micro: Any) -> tuple[StageOutput, set[str]]:
    """The stage's forward pass of a micro-batch that is there already, and the operators it called."""
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(faked(mode, parameter), requires_grad=False))
    load_ME = faked(mode, torch.zeros(3, stage.run.model.decoder.moe.experts))
    with mode, torch.no_grad(), Indexing(), Called() as called:
        return stage(micro, load_ME), called.names


def moved(mode: FakeTensorMode, value: Any) -> Any:
    """A dataclass with its tensors, and those of what it holds, on the fake GPU."""
    if isinstance(value, Tensor):
        return faked(mode, value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: moved(mode, held) for name, held in vars(value).items()})
    return value


def faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


def _no_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> ClassifierSums:
    assert hidden.device == weight.device == bias.device == targets.device == GPU
    counted = targets.flatten() != IGNORE
    losses = torch.zeros_like(counted, dtype=torch.float32)
    return ClassifierSums(hidden.new_zeros((), dtype=torch.float32), counted.sum(), counted.sum(), losses, counted)


@pytest.fixture(autouse=True)
def _without_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "linear_cross_entropy", _no_cross_entropy)


@pytest.mark.parametrize("bias", ["global", "local"])
@pytest.mark.slow
def test_a_forward_pass_in_bfloat16_never_waits_for_the_device(bias: str) -> None:
    output, called = forward(torch.bfloat16, f"decoder.moe.bias={bias}")
    assert {tensor.device for tensor in output} == {GPU}
    assert {"torch_attn::_varlen_attn", "aten::_grouped_mm"} <= called, "other kernels than CUDA's were chosen"


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.slow
def test_nor_does_one_of_dialogues(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(run_config(stage="smat", turns=3, depth=2, recompute_turns=recompute)).to(torch.bfloat16)
    micro, mode = stage.prepare(dialogue_batch(), None), FakeTensorMode()
    memory = faked(mode, torch.zeros(2, 8, 6, 32))
    monkeypatch.setattr(stage, "first_memory", lambda *_: memory)
    output, _ = on_gpu(mode, stage, moved(mode, micro))
    assert {tensor.device for tensor in output} == {GPU}


@pytest.mark.parametrize("kind", [kind for kind in STAGES if kind not in ("joint", "smat")])
@pytest.mark.slow
def test_nor_does_one_of_any_other_stage(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(memory, "keyed_normal", lambda *key: torch.zeros(key[4], device=key[5]))
    stage = make_stage(run_config(stage=kind)).to(torch.bfloat16)
    mode = FakeTensorMode()
    output, _ = on_gpu(mode, stage, moved(mode, stage.prepare(batch_for(stage.run), None)))
    assert {tensor.device for tensor in output} == {GPU}


def test_the_loop_over_experts_does_wait_and_is_noticed() -> None:
    """float32 on a GPU is for tests only; it also shows that a wait would be found."""
    with pytest.raises(DataDependentOutputException):
        forward(torch.float32)


@pytest.mark.parametrize("waits", [torch.bincount, torch.repeat_interleave])
def test_a_shape_that_depends_on_data_is_noticed(waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "count_experts", lambda flat, _: waits(flat))
    with pytest.raises(DynamicOutputShapeException):
        forward(torch.bfloat16)
