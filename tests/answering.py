"""Small systems that answer: with the reference's weights, and with random ones of every variant."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import model_config
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.data.text import Text
from rxt_dist.inference.assistant import Assistant
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.model.reference_names import to_ours

DATA = Path(__file__).parent / "data/conformance/stages"
CONFIG = ModelConfig.model_validate(
    {
        "name": "stages",
        "dim": 40,
        "layers": 4,
        "heads": 10,
        "vocab_size": 71,
        "seq_len": 64,
        "stm_slots": 14,
        "rope_base": 100000,
        "norm_eps": None,
        "decoder": {
            "stateless_before": ["dense"],
            "stateless_after": ["moe"],
            "self_attention": {"query_heads": 4, "kv_heads": 2, "gated": True},
            "cross_attention": {"query_heads": 4, "kv_heads": 2},
            "dense_hidden": 56,
            "moe": {"experts": 5, "active": 2, "hidden": 18, "shared_experts": 2, "shared_hidden": 22},
        },
        "encoder": {"attention": {"query_heads": 5, "kv_heads": 5, "gated": True}, "hidden": 72},
        "memory_attention": {"variant": "grouped", "groups": 2, "attention": {"query_heads": 5, "kv_heads": 5}},
    }
)
# Structures that differ in what is cached, or in how a token is computed.
VARIANTS: dict[str, tuple[str, ...]] = {
    "beta": (),
    "one key head": ("decoder.self_attention.kv_heads=1", "decoder.cross_attention.kv_heads=1"),
    "all heads, no gates": ("decoder.self_attention={query_heads: 4, kv_heads: 4}",),
    "no stateless layers": ("decoder.stateless_before=[]", "decoder.stateless_after=[]"),
    "more stateless layers": ("decoder.stateless_before=[dense, moe]", "decoder.stateless_after=[moe, moe]"),
    "local biases": ("decoder.moe.bias=local", "decoder.moe.shared_bias=local", "decoder.attention_bias=true"),
    "no shared experts": ("decoder.moe.shared_experts=0", "decoder.moe.shared_hidden=0", "decoder.head_norm=none"),
    "interlayer memory": ("memory_attention.variant=interlayer", "memory_attention.groups=1"),
    "old angles": ("rope_angles=bfloat16", "norm_eps=null"),
}


@cache
def vectors(name: str) -> dict[str, Tensor]:
    """All tensors of a file of the reference implementation's numbers."""
    return load_file(DATA / f"{name}.safetensors")


@cache
def reference_network() -> ReactiveTransformer:
    """The system of `CONFIG` with the reference's weights; it has no MLM head."""
    network = ReactiveTransformer(CONFIG, ("embedding", "decoder", "lm_head", "encoder", "memory_attention"))
    state: dict[str, Tensor] = {}
    for part in ("encoder", "decoder", "memory_attention"):
        own = {name.removeprefix(f"{part}."): value for name, value in vectors("weights").items()}
        state |= to_ours(CONFIG, part, {k: v for k, v in own.items() if f"{part}.{k}" in vectors("weights")})
    network.load_state_dict(state, strict=True)
    return network.eval()


def network_of(*overrides: str, seed: int = 0) -> ReactiveTransformer:
    """A tiny network with random weights, large enough that every part of it matters."""
    network = ReactiveTransformer(model_config("seq_len=64", *overrides))
    initialise(network, seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
            elif parameter.dim() > 1 and not name.startswith("embedding"):
                parameter.mul_(3)
    return network.eval()


def assistant_of(folder: Path, *overrides: str, seed: int = 0) -> Assistant:
    """An assistant of 128 ids."""
    text = Text(byte_tokenizer(folder / "tokenizer.json"), 128)
    return Assistant(network_of(*overrides, seed=seed), text)
