"""Randomness as a pure function of (seed, kind, sample, index), for masks and noise.

A mask drawn here depends on the global position of its sample and on nothing else: not on the rank, the micro-batch,
the device or how often it was drawn before (activation checkpointing recomputes it). The hash is splitmix64 in int64
arithmetic, which wraps and is exact on every device; only the last step, 24 bits to float32, is floating point, and
that is exact too. A sample read again in a later epoch stands at another position, so it gets another mask.
"""

from __future__ import annotations

import hashlib

import torch

from rxt_dist.data.rows import MASK_ID, SPECIAL_COUNT

IGNORED_LABEL = -100


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own one copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def _key(*parts: object) -> int:
    text = "|".join(str(part) for part in ("rxt-keyed-v1", *parts))
    return int.from_bytes(hashlib.shake_256(text.encode()).digest(8), "little")


def keyed_uniform(seed: int, kind: str, samples_B: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform float32 [B, count] in [0, 1), on the device of `samples_B` (int64 [B] global positions).

    Element (b, i) depends on (seed, kind, samples_B[b], i) only. The values are multiples of 2^-24. Costs two int64
    temporaries of the result's size.
    """
    key = _signed(_key(seed, kind))
    sample_keys_B1 = _mix(_mix(samples_B.unsqueeze(1) * _GAMMA + key) + key)
    index_N = torch.arange(1, count + 1, dtype=torch.int64, device=samples_B.device)
    bits_BN = _shift_right(_mix(sample_keys_B1 + index_N * _GAMMA), 40)
    return bits_BN.to(torch.float32) * 2.0**-24


def mask_for_mlm(
    tokens_BT: torch.Tensor,
    samples_B: torch.Tensor,
    seed: int,
    probability: float,
    mask_id: int = MASK_ID,
    special_bound: int = SPECIAL_COUNT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask tokens for the encoder: each non-special one becomes `mask_id` with `probability`.

    Args:
        tokens_BT: int64 [B, T].
        samples_B: int64 [B] global positions.
        special_bound: ids below it are special and are never masked.

    Returns:
        masked_tokens_BT, and mlm_labels_BT with the original id where masked and -100 elsewhere (both int64 [B, T]).
    """
    drawn_BT = keyed_uniform(seed, "mlm", samples_B, tokens_BT.shape[1]) < probability
    chosen_BT = drawn_BT & (tokens_BT >= special_bound)
    return tokens_BT.masked_fill(chosen_BT, mask_id), tokens_BT.masked_fill(~chosen_BT, IGNORED_LABEL)


def masked_row(tokens: list[int], sample: int, seed: int, probability: float) -> list[int]:
    """One row as the encoder sees it, by `mask_for_mlm`, for callers that know no tensors; `sample` is its position."""
    masked_BT, _ = mask_for_mlm(torch.tensor([tokens]), torch.tensor([sample]), seed, probability)
    return [int(token) for token in masked_BT[0]]


def sample_seed(seed: int, stage: str, kind: str, sample: int) -> int:
    """A 63-bit seed for a `torch.Generator` that draws one sample's noise of one kind in one stage."""
    return _key(seed, stage, kind, sample) >> 1
