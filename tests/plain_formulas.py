"""The formulas of docs/model.md written out once more, one document at a time, in float64 and without any trick.

Nothing here is taken from the package but names of parameters, so that what the package computes with packing, masks,
grouped products and hand-written backward passes is compared with something absolute. A document is [T, D]; parameters
are a mapping from the model's names to float64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_dist.config.model import AttentionConfig, ModelConfig

Parameters = Mapping[str, Tensor]


def norm(parameters: Parameters, name: str, x_TD: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * w."""
    return x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + eps).sqrt() * parameters[f"{name}.weight"]


def linear(parameters: Parameters, name: str, x_TD: Tensor) -> Tensor:
    """W x, and + b where there is one."""
    y = x_TD @ parameters[f"{name}.weight"].T
    return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y


def rotate(head_Td: Tensor, base: float) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of position t by t * base^(-2i/d)."""
    length, size = head_Td.shape
    columns = []
    for i in range(size // 2):
        angles = torch.arange(length, dtype=torch.float64) * base ** (-2 * i / size)
        even, odd = head_Td[:, 2 * i], head_Td[:, 2 * i + 1]
        columns += [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
    return torch.stack(columns, dim=1)


def attention(
    parameters: Parameters,
    name: str,
    config: ModelConfig,
    shape: AttentionConfig,
    x_TD: Tensor,
    source_SD: Tensor,
    *,
    causal: bool = False,
    rotates: str = "",
) -> Tensor:
    """SQA, one head at a time; `rotates` names which of q and k carry positions."""
    size = config.dim // config.heads
    q, k, v = (
        linear(parameters, f"{name}.{letter}_proj", y)
        for letter, y in (("q", x_TD), ("k", source_SD), ("v", source_SD))
    )
    heads = []
    for head in range(shape.query_heads):
        served = head // (shape.query_heads // shape.kv_heads)
        q_Td, k_Sd, v_Sd = (y[:, at * size : (at + 1) * size] for y, at in ((q, head), (k, served), (v, served)))
        q_Td = rotate(q_Td, config.rope_base) if "q" in rotates else q_Td
        k_Sd = rotate(k_Sd, config.rope_base) if "k" in rotates else k_Sd
        scores = q_Td @ k_Sd.T / math.sqrt(size)
        if causal:
            later = torch.arange(len(k_Sd)) > torch.arange(len(q_Td)).unsqueeze(1)
            scores = scores.masked_fill(later, -math.inf)
        heads.append(scores.softmax(-1) @ v_Sd)
    joined = torch.cat(heads, dim=1)
    if shape.gated:
        joined = joined * torch.sigmoid(linear(parameters, f"{name}.gate_proj", x_TD))
    return linear(parameters, f"{name}.out_proj", joined)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def dense(parameters: Parameters, name: str, x_TD: Tensor) -> Tensor:
    """W2 (SiLU(g) * u) + b2 with [g, u] = W1 x + b1."""
    gate, up = linear(parameters, f"{name}.gate_up_proj", x_TD).chunk(2, dim=-1)
    return linear(parameters, f"{name}.down_proj", silu(gate) * up)


def encoder(parameters: Parameters, config: ModelConfig, x_TD: Tensor) -> list[Tensor]:
    """The residual stream after every layer."""
    assert config.encoder is not None
    assert config.norm_eps is not None
    outputs = []
    for layer in range(config.layers):
        name = f"encoder.layers.{layer}"
        normed = norm(parameters, f"{name}.attention_norm", x_TD, config.norm_eps)
        shape = config.encoder.attention
        x_TD = x_TD + attention(parameters, f"{name}.attention", config, shape, normed, normed, rotates="qk")
        normed = norm(parameters, f"{name}.feed_forward_norm", x_TD, config.norm_eps)
        x_TD = x_TD + dense(parameters, f"{name}.feed_forward", normed)
        outputs.append(x_TD)
    return outputs


@dataclass
class Routed:
    """What one MoE layer's router said of one document: sums over its tokens."""

    balance: Tensor
    z: Tensor
    counts_E: Tensor


def expert(parameters: Parameters, name: str, index: int, x_D: Tensor) -> Tensor:
    """One expert of a stack, on one token."""
    hidden = parameters[f"{name}.gate_up_proj"][index] @ x_D
    if f"{name}.gate_up_bias" in parameters:
        hidden = hidden + parameters[f"{name}.gate_up_bias"][index]
    gate, up = hidden.chunk(2)
    down = parameters[f"{name}.down_proj"][index]
    # Routed stacks hold [D, F], shared ones [F, D].
    output = (silu(gate) * up) @ (down if name.endswith("shared") else down.T)
    return output + parameters[f"{name}.down_bias"][index] if f"{name}.down_bias" in parameters else output


def moe(parameters: Parameters, name: str, config: ModelConfig, x_TD: Tensor, load_E: Tensor) -> tuple[Tensor, Routed]:
    """Routed and shared experts, one token at a time."""
    shape = config.decoder.moe
    logits = x_TD @ parameters[f"{name}.routed.gate.weight"].T
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    counts_E = torch.zeros(shape.experts, dtype=torch.int64)
    rows = []
    for x_D, p_E in zip(x_TD, probs, strict=True):
        chosen = p_E.argsort(descending=True)[: shape.active].tolist()
        total = sum(p_E[e] for e in chosen)
        out_D = sum(p_E[e] / total * expert(parameters, f"{name}.routed.experts", e, x_D) for e in chosen)
        counts_E[chosen] += 1
        if shape.shared_experts:
            shares = torch.ones(1, dtype=torch.float64)
            if shape.shared_experts > 1:
                shares = (parameters[f"{name}.shared.gate.weight"] @ x_D).softmax(0)
            for s in range(shape.shared_experts):
                out_D = out_D + shares[s] * expert(parameters, f"{name}.shared", s, x_D)
        for bias in ("global_bias", "shared_bias"):
            if f"{name}.{bias}" in parameters:
                out_D = out_D + parameters[f"{name}.{bias}"]
        rows.append(out_D)
    balance = shape.experts * (probs * load_E).sum()
    return torch.stack(rows), Routed(balance, logits.logsumexp(-1).pow(2).sum(), counts_E)


def decoder(
    parameters: Parameters, config: ModelConfig, x_TD: Tensor, memory: list[Tensor], load_ME: Tensor
) -> tuple[Tensor, list[Routed]]:
    """Hidden states after the head norm, and what the routers said; `memory` has one [S, D] a stateful layer."""
    kinds = [*config.decoder.stateless_before, *["stateful"] * config.layers, *config.decoder.stateless_after]
    eps = config.norm_eps
    assert eps is not None
    routed: list[Routed] = []
    stateful = 0
    for layer, kind in enumerate(kinds):
        name = f"decoder.layers.{layer}"
        normed, shape = norm(parameters, f"{name}.attention_norm", x_TD, eps), config.decoder.self_attention
        x_TD = x_TD + attention(
            parameters, f"{name}.attention", config, shape, normed, normed, causal=True, rotates="qk"
        )
        if kind == "stateful":
            normed = norm(parameters, f"{name}.cross_norm", x_TD, eps)
            slots = norm(parameters, f"{name}.memory_norm", memory[stateful], eps)
            shape, stateful = config.decoder.cross_attention, stateful + 1
            x_TD = x_TD + attention(parameters, f"{name}.cross_attention", config, shape, normed, slots, rotates="q")
        normed = norm(parameters, f"{name}.feed_forward_norm", x_TD, eps)
        if kind == "dense":
            x_TD = x_TD + dense(parameters, f"{name}.feed_forward", normed)
        else:
            out, of_layer = moe(parameters, f"{name}.feed_forward", config, normed, load_ME[len(routed)])
            x_TD = x_TD + out
            routed.append(of_layer)
    if config.decoder.head_norm == "rms":
        x_TD = norm(parameters, "decoder.head_norm", x_TD, eps)
    return x_TD, routed


def mlm_logits(parameters: Parameters, hidden_MD: Tensor) -> Tensor:
    """Linear, GELU (erf), LayerNorm, Linear."""
    x = linear(parameters, "mlm_head.dense", hidden_MD)
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return linear(
        parameters, "mlm_head.output", x * parameters["mlm_head.norm.weight"] + parameters["mlm_head.norm.bias"]
    )


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, int]:
    """Summed -log softmax of the targets, and how many have the largest logit."""
    losses = [logits.logsumexp(0) - logits[target] for logits, target in zip(logits_NV, targets_N, strict=True)]
    hits = sum(int(logits.argmax()) == int(target) for logits, target in zip(logits_NV, targets_N, strict=True))
    return torch.stack(losses).sum() if losses else logits_NV.sum() * 0, hits


def gate(parameters: Parameters, name: str, old_SD: Tensor, new_SD: Tensor) -> Tensor:
    """The elementwise residual gate: g = sigmoid(w * mean of old + new) per slot; g new + (1 - g) old."""
    g = torch.sigmoid(parameters[f"{name}.weight"] * (old_SD + new_SD).mean(-1, keepdim=True))
    return g * new_SD + (1 - g) * old_SD


def memory_write(parameters: Parameters, config: ModelConfig, memory: list[Tensor], data: list[Tensor]) -> list[Tensor]:
    """The next memory after one interaction without padding: one [S, D] a layer, from one [T, D] a layer."""
    shapes, eps = config.memory_attention, config.norm_eps
    assert shapes is not None
    assert eps is not None
    written = []
    for layer, (old, encoded) in enumerate(zip(memory, data, strict=True)):
        name, mixed = f"memory_attention.layers.{layer}", old
        if shapes.variant != "simple":
            normed = norm(parameters, f"{name}.inner_norm", old, eps)
            source = normed
            if shapes.variant != "self":
                size = config.layers // shapes.groups
                group = memory[layer // size * size : (layer // size + 1) * size]
                across = norm(parameters, "memory_attention.across_norm", torch.stack(group).mean(0), eps)
                source = across
                if shapes.variant != "interlayer":
                    source = gate(parameters, f"{name}.mixing_gate", normed, across)
            inner = shapes.inner_attention or shapes.attention
            read = attention(parameters, f"{name}.inner_attention", config, inner, normed, source)
            mixed = gate(parameters, f"{name}.inner_gate", old, read)
        normed = norm(parameters, f"{name}.write_norm", mixed, eps)
        encoded = norm(parameters, f"{name}.input_norm", encoded, eps)
        read = attention(parameters, f"{name}.write_attention", config, shapes.attention, normed, encoded, rotates="k")
        written.append(gate(parameters, f"{name}.write_gate", mixed, read))
    return written
