"""The operations of training a model so small that they can be counted on paper."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.config.load import load_model
from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.model.flops import flops_by_part

# D 8, H 4 (head size 2), V 10. One dense stateless layer, two stateful MoE layers, two encoder layers.
TINY = """
name: tiny
dim: 8
layers: 2
heads: 4
vocab_size: 10
seq_len: 8
stm_slots: 4
decoder:
  stateless_before: [dense]
  self_attention: {query_heads: 2, kv_heads: 1}
  cross_attention: {query_heads: 2, kv_heads: 2}
  dense_hidden: 16
  moe: {experts: 4, active: 2, hidden: 4, bias: none}
  head_norm: none
encoder:
  attention: {query_heads: 4, kv_heads: 4}
  hidden: 12
"""


ALL: tuple[PartName, ...] = ("embedding", "decoder", "lm_head", "encoder", "mlm_head")


def training_flops(model: ModelConfig, tokens: int, pairs: int, targets: int, parts: tuple[PartName, ...] = ALL) -> int:
    return sum(flops_by_part(model, tokens, pairs, targets, parts).values())


def hand_count(tokens: int, pairs: int, targets: int) -> int:
    # Self-attention: q 8*4, k 8*2, v 8*2, out 4*8 = 96. Cross: 4 * 8*4 = 128. Encoder attention: 4 * 8*8 = 256.
    dense = 3 * 8 * 16 + 2 * 16 + 8  # 424
    moe = 4 * 8 + 2 * (3 * 8 * 4)  # router, and the two experts a token visits: 224
    decoder = (96 + dense + 2 * 8) + 2 * (96 + 128 + moe + 4 * 8) + (8 * 10 + 10)  # 536 + 960 + 90
    encoder = 2 * (256 + 3 * 8 * 12 + 2 * 12 + 8 + 2 * 8)  # 2 * 592
    head = (8 * 8 + 8) + 2 * 8 + (8 * 10 + 10)  # 178
    assert (decoder, encoder, head) == (1586, 1184, 178)
    # Scores and values: 2 * 2 * width per pair, three times; widths 4 (decoder self, halved), 4 (cross), 8 (encoder).
    attention = 12 * pairs * (3 * 4 // 2 + 2 * 4 + 2 * 8)
    return 6 * (decoder + encoder) * tokens + 6 * head * targets + attention


def test_hand_count(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    model = load_model(path)
    # Two rows of 8: documents of 5 and 3 tokens, and of 6 tokens with two of padding; two positions are masked.
    tokens, pairs, targets = 14, 25 + 9 + 36, 2
    assert training_flops(model, tokens, pairs, targets) == hand_count(tokens, pairs, targets)
    assert training_flops(model, tokens, 0, 0) == 6 * (1586 + 1184) * 14


def test_what_is_spent_on_which_part(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    found = flops_by_part(load_model(path), 14, 70, 2, ALL)
    norm, pairs = 8, 12 * 70
    assert found == {
        "encoder": 6 * 14 * 1184 + pairs * 16,
        "mlm_head": 6 * 2 * 178,
        "self_attention": 6 * 14 * 3 * (96 + norm) + pairs * 6,
        "cross_attention": 6 * 14 * 2 * (128 + 2 * norm) + pairs * 8,
        "feed_forward": 6 * 14 * (424 + 2 * 224 + 3 * norm),
        "lm_head": 6 * 14 * 90,
    }


def test_a_decoder_alone_has_only_its_own_terms() -> None:
    model = load_model(Path(__file__).parents[2] / "configs/model/rxt-alpha-mini.yaml")
    without_embedding = 13_584_144 - 10_000 * 256
    # Eight layers of width 128: causal self-attention and memory cross-attention.
    parts: tuple[PartName, ...] = ("embedding", "decoder", "lm_head")
    assert training_flops(model, 100, 5000, 0, parts) == 6 * without_embedding * 100 + 12 * 5000 * 128 * (8 // 2 + 8)
