"""The device's own limits, and attention, experts and cross-entropy alone beside them."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.context import Context
from gpu_parts.device import Device, fitting
from gpu_parts.work import BETA, batch, configuration, row_tokens
from rxt_dist.config.model import AttentionConfig
from rxt_dist.engine.build import choose_kernels
from rxt_dist.model.attention import Documents, attend
from rxt_dist.model.cross_entropy import linear_cross_entropy
from rxt_dist.model.moe import MoEFeedForward

# Dense bfloat16 peaks as their makers state them, operations a second.
DATASHEET = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "pydantic",
    "pyarrow",
    "triton",
    "flash-attn",
    "liger-kernel",
    "rxlm",
)
BYTES = 2  # of a bfloat16 number
ROOT = Path(__file__).resolve().parents[2]


def environment(context: Context) -> None:
    """Where this was measured, and with what."""
    device = context.device
    found: dict[str, Any] = {"python": sys.version.split()[0], "machine": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    found["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if device.cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GB": round(properties.total_memory / 1e9, 1),
            "cuda of torch": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
        if properties.major < 9:
            context.note(
                context.note("torch has grouped products from compute capability 9 on; training takes DeepSpeed's here")
            )
        peak = next((value for name, value in DATASHEET.items() if name in properties.name), None)
        if peak:
            context.report.fact("bf16_flops_datasheet", peak)
    for name, value in found.items():
        context.row(what=name, value=str(value))
    context.report.fact("device", found.get("device", "CPU (dry run)"))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "there, without metadata" if importlib.util.find_spec(name.replace("-", "_")) else "not installed"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def peaks(context: Context) -> None:
    """A large copy and large products on this device: the limits that everything else is held against."""
    device = context.device
    rate = _copy_rate(device, 1 << 12 if device.dry else 1 << 30)
    context.row(what="copy on the device", GB_per_s=rate, TFLOP_per_s="")
    context.report.fact("copy_gb_per_s_measured", rate)
    edge = 128 if device.dry else 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("TF32 or float32", torch.float32)):
        torch.set_float32_matmul_precision("high")
        one, other = (torch.randn(edge, edge, device=device.device).to(dtype) for _ in range(2))
        milliseconds = device.milliseconds(lambda one=one, other=other: one @ other)
        rate = 2 * edge**3 / milliseconds / 1e9
        context.row(what=f"product of {edge} x {edge}, {name}", GB_per_s="", TFLOP_per_s=rate)
        if dtype == torch.bfloat16:
            context.report.fact("bf16_tflops_measured", rate)


def _copy_rate(device: Device, elements: int) -> float:
    """GB/s of a copy, bytes read and bytes written counted."""
    source = torch.ones(elements, dtype=torch.int32, device=device.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / device.milliseconds(lambda: target.copy_(source)) / 1e6


def attention(context: Context) -> None:
    """Attention of one RxT-Beta row against its limits, packed and as one document."""
    device, config = context.device, configuration(BETA, context.device)
    tokens = row_tokens(BETA, device)
    packed = batch(config, tokens, 1)
    model = config.model
    assert model.encoder is not None
    whole = Documents(torch.tensor([0, tokens], dtype=torch.int32, device=device.device), (tokens,))
    many = Documents(packed.cu_seqlens.to(device.device), tuple(packed.cu_seqlens.diff().tolist()))
    decoder = model.decoder
    cases = [
        ("decoder, packed", decoder.self_attention, many, True),
        ("memory, packed", decoder.cross_attention, many, False),
        ("encoder, packed", model.encoder.attention, many, False),
        ("decoder, one document", decoder.self_attention, whole, True),
        ("encoder, one document", model.encoder.attention, whole, False),
    ]
    for name, heads, documents, causal in cases:
        with fitting(device) as outcome:
            _attention(context, name, heads, documents, causal, tokens)
        if outcome:
            context.row(what=name, ms=outcome[0])
    context.note(f"packed: {len(many.lengths)} documents, the longest of {many.longest} tokens")
    context.note("floor of the backward pass: twice the operations of the forward pass, recomputed scores not counted")


def _attention(
    context: Context, name: str, heads: AttentionConfig, documents: Documents, causal: bool, tokens: int
) -> None:
    device, size = context.device, configuration(BETA, context.device).model.head_dim
    counts = (heads.query_heads, heads.kv_heads, heads.kv_heads)
    q, k, v = (
        torch.randn(1, tokens, count, size, device=device.device).bfloat16().requires_grad_() for count in counts
    )
    pairs = sum(length**2 for length in documents.lengths) * (0.5 if causal else 1.0)
    operations = 4.0 * pairs * heads.query_heads * size
    read = sum(x.numel() for x in (q, k, v)) * BYTES
    written = q.numel() * BYTES
    _forward_and_backward(
        context,
        name,
        lambda: attend(q, k, v, causal=causal, documents=documents),
        (q, k, v),
        (operations, read + written),
        (2 * operations, 2 * read + 2 * written),
    )


def _forward_and_backward(
    context: Context,
    name: str,
    forward: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    forward_work: tuple[float, float],
    backward_work: tuple[float, float],
) -> None:
    """A row for each pass; work: (operations, bytes that must move)."""
    device = context.device
    output = forward()
    direction = torch.randn_like(output)

    def backward() -> None:
        torch.autograd.grad(output, leaves, direction, retain_graph=True)

    def without_gradients() -> None:
        with torch.no_grad():
            forward()

    passes = (("forward", without_gradients, forward_work), ("backward", backward, backward_work))
    for which, action, work in passes:
        milliseconds = device.milliseconds(action)
        floor, limit = context.floor_ms(*work)
        context.row(
            what=name,
            which=which,
            ms=milliseconds,
            floor_ms=floor,
            limit=limit,
            of_floor=floor / milliseconds,
            TFLOP_per_s=work[0] / milliseconds / 1e9,
            GB_per_s=work[1] / milliseconds / 1e6,
        )


def experts(context: Context) -> None:
    """Routed experts of one RxT-Beta layer against their limits: even, and as a random router chooses."""
    device, config = context.device, configuration(BETA, context.device)
    choose_kernels(config, device.device)
    tokens, moe, dim = row_tokens(BETA, device), config.model.decoder.moe, config.model.dim
    with device.device:
        layer = MoEFeedForward(config.model).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, (5 * dim) ** -0.5) if parameter.dim() > 1 else parameter.zero_()
    x_ND = torch.randn(tokens, dim, device=device.device).bfloat16().requires_grad_()
    even_NK = torch.arange(tokens * moe.active, device=device.device).view(tokens, moe.active) % moe.experts
    random_NK = torch.rand(tokens, moe.experts, device=device.device).topk(moe.active).indices
    weights_NK = torch.full((tokens, moe.active), 1 / moe.active, device=device.device)
    stack = layer.routed.experts
    parameters = tuple(stack.parameters())
    matrices = sum(parameter.numel() for parameter in parameters) * BYTES
    activations = 2 * x_ND.numel() * BYTES
    operations = 2.0 * tokens * moe.active * 3 * dim * moe.hidden
    for name, chosen_NK in (("experts, even", even_NK), ("experts, random", random_NK)):
        _forward_and_backward(
            context,
            name,
            lambda chosen_NK=chosen_NK: stack(x_ND, chosen_NK, weights_NK),
            (x_ND, *parameters),
            (operations, matrices + activations),
            (2 * operations, 2 * matrices + 2 * activations),
        )
    x_BTD = x_ND.detach().unsqueeze(0).requires_grad_()
    shared = 2.0 * tokens * moe.shared_experts * 3 * dim * moe.shared_hidden
    work = operations + shared
    _forward_and_backward(
        context,
        "layer with router and shared experts",
        lambda: layer(x_BTD)[0],
        (x_BTD, *(p for p in layer.parameters() if p.requires_grad)),
        (work, matrices + activations),
        (2 * work, 2 * matrices + 2 * activations),
    )
    context.note("bytes of the floor: every weight and every input once; sorted copies of tokens are not counted")


def cross_entropy(context: Context) -> None:
    """The vocabulary's cross-entropy of one RxT-Beta row, in chunks as in training, and as torch does it at once."""
    device, config = context.device, configuration(BETA, context.device)
    choose_kernels(config, device.device)
    tokens, dim, words = row_tokens(BETA, device), config.model.dim, config.model.vocab_size
    hidden_ND, weight_VD = (
        torch.randn(rows, dim, device=device.device).mul_(0.05).bfloat16().requires_grad_() for rows in (tokens, words)
    )
    bias_V = torch.zeros(words, device=device.device, dtype=torch.bfloat16, requires_grad=True)
    targets_N = torch.randint(0, words, (tokens,), device=device.device)
    chunk = config.train.logit_chunk_tokens
    ways: dict[str, Callable[[], Tensor]] = {
        f"chunks of {chunk}": lambda: linear_cross_entropy(hidden_ND, weight_VD, bias_V, targets_N, chunk).loss,
        "one chunk": lambda: linear_cross_entropy(hidden_ND, weight_VD, bias_V, targets_N, tokens).loss,
        "torch, float32 logits": lambda: F.cross_entropy(
            F.linear(hidden_ND, weight_VD, bias_V).float(), targets_N, reduction="sum"
        ),
    }
    # Logits, and the gradients of hidden states and of the weight.
    floor, limit = context.floor_ms(6.0 * tokens * dim * words, 0.0)
    for name, way in ways.items():
        device.forget_peak()
        with fitting(device) as outcome:
            milliseconds = device.milliseconds(
                lambda way=way: torch.autograd.grad(way(), (hidden_ND, weight_VD, bias_V))
            )
            context.row(
                way=name,
                ms=milliseconds,
                floor_ms=floor,
                limit=limit,
                of_floor=floor / milliseconds,
                GB=device.peak_gb(),
            )
        if outcome:
            context.row(way=name, ms=outcome[0])
