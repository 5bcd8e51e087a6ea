"""Whether this machine can train: versions, tools, devices, and the facts about the engine that training relies on.

DeepSpeed's expert parallelism changes from week to week. What rxt_dist/engine expects of it is listed in `ENGINE_FACTS`
and looked up here, so that another version is refused by a sentence and not by a traceback in the third hour.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rxt_dist.engine.compiler import find_compiler
from rxt_dist.lasting import lasting_imports

PINNED = ("torch", "deepspeed", "megatron-core")
MINIMUM_PYTHON = (3, 11)
_FEW_GB = 20.0
_GLOO_SECONDS = 20

# Module, name in it, and words in its source: the methods and attributes that the engine calls or sets.
ENGINE_FACTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "deepspeed.module_inject.auto_ep_layer",
        "AutoEPMoELayer",
        (
            "self.router =",
            "self.experts =",
            "self.expert_bias",
            "self.return_router_logits",
            "self.top_k",
            "RouterOutput(*self.router(x, self.expert_bias))",
            "return self._finalize_output(output, x, hidden_states, hdim)",
            "self.num_local_experts",
            "param.ds_zero_placement_family =",
            "param.ds_zero_partition_group_name =",
        ),
    ),
    (
        "deepspeed.module_inject.auto_ep",
        "AutoEP",
        ("from deepspeed.module_inject.auto_ep_layer import (AutoEPMoELayer,", "replacement = AutoEPMoELayer("),
    ),
    (
        "deepspeed.moe.ep_experts",
        "GroupedExperts",
        ("self.w1 =", "self.w2 =", "self.w3 =", "self.use_triton_grouped_mm ="),
    ),
    ("deepspeed.moe.ep_router", "TokenChoiceTopKRouter", ("self.gate =", "self.top_k =", "self.num_experts =")),
    (
        "deepspeed.runtime.engine",
        "DeepSpeedEngine",
        ("def set_gradient_accumulation_boundary", "def was_step_applied", "scale_wrt_gas"),
    ),
    (
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer",
        (
            "def update_lp_params",
            "self.single_partition_of_fp32_groups",
            "self.check_grad_overflow",
        ),
    ),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        (
            "def _reassign_or_swap_out_partitioned_parameters",
            "def _get_fp32_opt_state_partition",
            "def _get_param_partition_rank",
            "self.fp32_partitioned_groups_flat",
            "self.persistent_parameters",
        ),
    ),
    ("deepspeed.runtime.zero.partitioned_param_coordinator", "PartitionedParameterCoordinator", ("is_external_param",)),
    (
        "deepspeed.runtime.zero.parameter_offload",
        "DeepSpeedZeRoOffload",
        (
            '"pre_bwd_fn" not in module.__dict__',
            '"post_bwd_fn" not in module.__dict__',
            "apply_to_tensors_only(module.pre_bwd_fn.apply,",
            "apply_to_tensors_only(module.post_bwd_fn.apply,",
        ),
    ),
    ("deepspeed.runtime.zero.parameter_offload", "ZeROOrderedDict", ("self._parent_module._parameters._in_forward",)),
    ("deepspeed.utils.nvtx", "instrument_w_nvtx", ("if enable_nvtx",)),
    ("deepspeed.utils.tensor_fragment", "tensor_fragment", ("hp_fragment_address", "lp_fragment_address")),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", ("self.fp32_groups_flat_partition", "def update_lp_params")),
    ("deepspeed.utils.groups", "_get_expert_parallel_rank", ()),
    ("deepspeed.ops.triton_ops", "is_triton_available", ()),
    ("deepspeed.ops.triton_ops", "group_gemm_triton", ("trans_b: bool",)),
    ("deepspeed.utils.groups", "_get_expert_parallel_group", ()),
    ("deepspeed.utils.groups", "_get_expert_data_parallel_group", ()),
    ("megatron.core.num_microbatches_calculator", "RampupBatchsizeNumMicroBatchesCalculator", ()),
)


# What DeepSpeed logs on a machine without a GPU, which the check of the accelerator says with what to do about it.
_NO_GPU = "Setting accelerator to CPU."


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it will do, what is there, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(directory: Path = Path()) -> list[Check]:
    """All checks, in the order in which to mend what fails; `directory` is where runs will be written."""
    checks = [_python(), *(_version(name) for name in PINNED), _compiler(), _disk(directory)]
    if importlib.util.find_spec("torch"):
        checks += [_accelerator(), _attempt("grouped matrix product", _grouped_mm), _attempt("gloo loopback", _gloo)]
    # DeepSpeed logs to stdout, which is for the findings, and megatron-core warns of extras that nothing here uses.
    with lasting_imports(), redirect_stdout(sys.stderr), warnings.catch_warnings(), _without(_NO_GPU):
        warnings.simplefilter("ignore")
        return checks + [_engine_fact(*fact) for fact in ENGINE_FACTS]


@contextmanager
def _without(beginning: str) -> Iterator[None]:
    """Leave out of DeepSpeed's log the lines that begin so, and no others."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _python() -> Check:
    found = sys.version.split()[0]
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info < MINIMUM_PYTHON:
        return Check("python", "fail", found, f"Install Python {wanted} or newer and make a new environment.")
    return Check("python", "ok", found)


def requirements() -> dict[str, str]:
    """Version requirements of this project by distribution name, from its installed metadata or its pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("rxt-dist") or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        lines = project["project"]["dependencies"]
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: str(requirement.specifier) for requirement in parsed if requirement.marker is None}


def _version(name: str) -> Check:
    from packaging.specifiers import SpecifierSet

    wanted = requirements().get(name, "")
    install = f'Run: pip install "{name}{wanted}"'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", install)
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, tested with {wanted}", install)
    return Check(name, "ok", found)


def _compiler() -> Check:
    compiler = find_compiler()
    if compiler:
        return Check("C compiler", "ok", compiler)
    advice = "Only GPUs need one, for kernels that Triton compiles (experts, train.compile). Install gcc there."
    return Check("C compiler", "warn", "none", advice)


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free / 1e9
    found = f"{free:.1f} GB free in {directory.absolute()}"
    if free < _FEW_GB:
        advice = "Enough for the demo; a checkpoint of RxT-Beta needs about 40 GB. Set `output` to a larger disk."
        return Check("disk", "warn", found, advice)
    return Check("disk", "ok", found)


def _accelerator() -> Check:
    import torch

    if not torch.cuda.is_available():
        advice = "Enough for the demo and the tests. For training install a CUDA build of torch on a machine with GPUs."
        return Check("accelerator", "warn", "none: CPU only", advice)
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return Check("accelerator", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}")


def _attempt(name: str, trial: Callable[[], str]) -> Check:
    """A trial that must work; whatever it raises is the finding."""
    try:
        return Check(name, "ok", trial())
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check(name, "fail", first_line, str(trial.__doc__).strip())


def _grouped_mm() -> str:
    """Routed experts need torch._grouped_mm: install the pinned torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = torch.ones(32, 16, device=device, dtype=dtype)
    weights = torch.ones(2, 16, 16, device=device, dtype=dtype)
    ends = torch.tensor([16, 32], device=device, dtype=torch.int32)
    product = torch._grouped_mm(rows, weights, offs=ends)
    if not bool((product == 16).all()):
        raise ArithmeticError("torch._grouped_mm gives wrong products")
    return f"torch._grouped_mm, {str(dtype).removeprefix('torch.')} on {device}"


def _gloo() -> str:
    """Two ranks of one machine must reach each other: check firewall, loopback device and GLOO_SOCKET_IFNAME."""
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    limit = timedelta(seconds=_GLOO_SECONDS)

    def rank_sum(rank: int) -> float:
        group: Any = dist.ProcessGroupGloo(store, rank, 2, limit)
        value = torch.tensor([float(rank + 1)])
        group.allreduce([value]).wait()
        return float(value)

    with ThreadPoolExecutor(2) as ranks:
        sums = list(ranks.map(rank_sum, range(2)))
    if sums != [3.0, 3.0]:
        raise ArithmeticError(f"an all-reduce of 1 and 2 gave {sums}")
    return "all-reduce of two ranks"


def _engine_fact(module: str, name: str, words: tuple[str, ...]) -> Check:
    check = f"{module.split('.')[0]}: {name}"
    advice = "Another version than the pinned one is installed; see above."
    try:
        value: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return Check(check, "fail", str(error).splitlines()[0], advice)
    source = inspect.getsource(value) if words else ""
    missing = [word for word in words if word not in source]
    if missing:
        return Check(check, "fail", f"{module} has no {', '.join(missing)}", advice)
    return Check(check, "ok", module)
