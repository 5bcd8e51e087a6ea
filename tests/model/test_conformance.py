"""Every number of the reference implementation, forward and gradients, to 1e-5 relative in float32."""

from __future__ import annotations

import pytest
import torch
from conformance import CONFIG, assert_close, part_of, positions, reference_model, vectors

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.memory import MemoryAttention, ResidualGate
from rxt_dist.model.moe import MoEFeedForward
from rxt_dist.model.norm_rope import rotary
from rxt_dist.model.reference_names import to_ours, to_reference

MOE_LAYERS = [
    "stateless_layers.1",
    "layers.0",
    "layers.1",
    "layers.2",
    "final_stateless_layers.0",
    "final_stateless_layers.1",
]


@pytest.fixture(scope="module")
def model():
    return reference_model()


@pytest.fixture(scope="module")
def padding():
    return vectors("inputs")["attention_mask"].bool()


def test_names_map_both_ways_and_cover_everything():
    for part in ("encoder", "decoder", "mlm_head"):
        theirs = part_of(vectors("weights"), f"{part}.")
        back = to_reference(CONFIG, part, to_ours(CONFIG, part, theirs))
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_attention_modules(model, padding):
    expected = vectors("attention")
    x, rotate = expected["x"], rotary(CONFIG, positions(24))
    stateful, encoder = model.decoder.layers[2], model.encoder.layers[0]
    assert_close(stateful.attention(x, rotate_q=rotate, rotate_k=rotate, causal=True), expected["dec_self.out"], "self")
    cross = stateful.cross_attention(x, expected["stm_layer0"], rotate_q=rotate)
    assert_close(cross, expected["dec_cross.out"], "cross")
    for name, keys in (("enc_self_masked", padding), ("enc_self_nomask", None)):
        out = encoder.attention(x, rotate_q=rotate, rotate_k=rotate, keys_BS=keys)
        assert_close(out, expected[f"{name}.out"], name)


@pytest.mark.parametrize(("module", "name"), [("self", "dec_self"), ("encoder", "enc_self_masked")])
def test_projections_and_rotation(model, module, name):
    expected = vectors("attention")
    attention = model.decoder.layers[2].attention if module == "self" else model.encoder.layers[0].attention
    rotate = rotary(CONFIG, positions(24))
    for letter in "qkv":
        heads = getattr(attention, f"{letter}_proj")(expected["x"]).unflatten(-1, (-1, CONFIG.head_dim))
        assert_close(heads.transpose(1, 2), expected[f"{name}.{letter}"], letter)
        if letter != "v":
            assert_close(rotate(heads).transpose(1, 2), expected[f"{name}.{letter}_rope"], f"{letter} rotated")
    assert_close(torch.sigmoid(attention.gate_proj(expected["x"])), expected[f"{name}.gate"], "gate")


@pytest.mark.parametrize("index", range(6))
def test_moe_layers(model, index):
    expected, name = vectors("moe"), MOE_LAYERS[index]
    feed_forward = model.decoder.layers[index + 1].feed_forward
    assert_close(feed_forward(expected["x"])[0], expected[f"{name}.out"], name)
    _, routing = feed_forward.routed(expected["x"])
    assert_close(routing.probs_NE, expected[f"{name}.probs"], "probabilities")
    assert torch.equal(routing.selected_NK.sort(-1).values, expected[f"{name}.topk_idx"].sort(-1).values)


def test_one_token(model):
    expected = vectors("moe")
    out, _ = model.decoder.layers[1].feed_forward(expected["x"][:1, :1])
    assert_close(out, expected["stateless_layers.1.single_token_out"], "single token")


def test_local_biases():
    expected = vectors("moe_local_bias")
    moe = {"experts": 8, "active": 3, "hidden": 24, "bias": "local", "shared_experts": 2, "shared_hidden": 24}
    raw = CONFIG.model_dump()
    raw["decoder"]["moe"] = moe | {"shared_bias": "local"}
    config = ModelConfig.model_validate(raw)
    layer = MoEFeedForward(config)
    renamed = to_ours(config, "decoder", {f"model.layers.0.ff.{k}": v for k, v in part_of(expected, "w.").items()})
    layer.load_state_dict({name.split("feed_forward.")[1]: tensor for name, tensor in renamed.items()})
    assert_close(layer(expected["x"])[0], expected["out"], "local biases")


def test_encoder_and_mlm_head(model, padding):
    inputs, expected = vectors("inputs"), vectors("forward")
    embedded = model.embedding(inputs["encoder_input_ids"])
    assert_close(embedded, expected["enc.embedding"], "embedding")
    masked = model.encoder(embedded, positions(24), keys_BT=padding)
    unmasked = model.encoder(embedded, positions(24))
    assert_close(masked, expected["enc.hidden.masked"], "encoder, padding masked")
    assert_close(unmasked, expected["enc.hidden.nomask"], "encoder")
    assert_close(model.mlm_head.logits(masked[-1]), expected["mlm.logits"], "MLM logits")
    assert_close(model.mlm_head.logits(unmasked[-1]), expected["mlm.logits.nomask"], "MLM logits")


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("joint_masked", "enc.hidden.masked"),
        ("joint_nomask", "enc.hidden.masked"),
        ("stm_random", "dec.stm_random"),
        ("stm_single", "dec.stm_random"),
    ],
)
def test_decoder_logits_at_real_tokens(model, padding, name, memory):
    """Outputs at padding are left out: the reference lets a padded query read the plain mean of the memory (a softmax
    over nothing but masked scores), which no real token ever sees."""
    expected = vectors("forward")
    memory_LBSD = expected[memory][:, :1] if name == "stm_single" else expected[memory]
    embedded = model.embedding(vectors("inputs")["input_ids"])
    hidden = model.decoder(embedded, positions(24), memory_LBSD).hidden_BTD
    logits = model.lm_head.logits(hidden)
    seen = torch.ones_like(padding) if name == "joint_nomask" else padding
    assert_close(logits[seen], expected[f"dec.logits.{name}"][seen], name)


def test_decoder_layer_by_layer(model, padding):
    expected = vectors("forward")
    x, memory = model.embedding(vectors("inputs")["input_ids"]), iter(expected["dec.stm_random"])
    rotate = rotary(CONFIG, positions(24))
    for index, layer in enumerate(model.decoder.layers):
        x, _ = layer(x, rotate, None, next(memory) if layer.stateful else None, None, None, None)
        assert_close(x[padding], expected["dec.hidden.stm_random"][index][padding], f"layer {index}")


def test_joint_losses_and_every_gradient(padding):
    model, inputs, expected = reference_model(), vectors("inputs"), vectors("joint")
    encoded = model.encoder(model.embedding(inputs["encoder_input_ids"]), positions(24), keys_BT=padding)
    chosen = inputs["mlm_labels"] != -100
    mlm = model.mlm_head(encoded[-1][chosen], inputs["mlm_labels"][chosen], 7)
    hidden = model.decoder(model.embedding(inputs["input_ids"]), positions(24), encoded.detach()).hidden_BTD
    targets = torch.where(padding, inputs["input_ids"], -100)[:, 1:]
    ar = model.lm_head(hidden[:, :-1], targets, 7)
    loss_mlm, loss_ar = mlm.loss / mlm.targets, ar.loss / ar.targets
    assert_close(loss_mlm, expected["loss.mlm"], "MLM loss")
    assert_close(loss_ar, expected["loss.ar"], "AR loss")
    (loss_mlm + loss_ar).backward()

    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in state.values()]).norm()
    assert_close(norm, expected["grad_norm"], "gradient norm")
    gradients = part_of(expected, "grad.")
    for part in ("encoder", "decoder", "mlm_head"):
        ours = to_reference(CONFIG, part, state)
        theirs = part_of(gradients, f"{part}.")
        for name, gradient in theirs.items():
            assert_close(ours[name], gradient, f"gradient of {part}.{name}")
        # The shared embedding stands once in the file, under one of its two names.
        assert set(ours) - set(theirs) <= {"model.embedding.weight"}


MEMORY_FILES = {
    "mem_simple": {"variant": "simple"},
    "mem_self": {"variant": "self"},
    "mem_interlayer": {"variant": "interlayer"},
    "mem_selfinterlayer": {"variant": "self-interlayer"},
    "mem_grouped": {"variant": "grouped", "groups": 3},
    "mem_selfinterlayer_linear": {"variant": "self-interlayer", "gate": {"kind": "linear"}},
}


@pytest.mark.parametrize("name", MEMORY_FILES)
def test_memory_attention(name, padding):
    heads = {"query_heads": 8, "kv_heads": 8}
    config = ModelConfig.model_validate(
        CONFIG.model_dump() | {"memory_attention": {"attention": heads} | MEMORY_FILES[name]}
    )
    expected, inputs = vectors(name), vectors("mem_inputs")
    weights = part_of(expected, "w.")
    renamed = to_ours(config, "memory_attention", weights)
    back = to_reference(config, "memory_attention", renamed)
    assert back.keys() == weights.keys()
    network = MemoryAttention(config, config.memory_attention)
    network.load_state_dict({key.removeprefix("memory_attention."): value for key, value in renamed.items()})
    start = inputs["stm0"].clone()
    step1, gates_LB = network(start, inputs["ed1"], positions(24), padding)
    step2, _ = network(step1, inputs["ed2"], positions(24), padding)
    assert gates_LB.shape == step1.shape[:2]
    assert_close(step1, expected["step1"], "first write")
    assert_close(step2, expected["step2"], "second write")
    unmasked, _ = network(start, inputs["ed1"], positions(24))
    assert_close(unmasked, expected["step1_nomask"], "write without padding")
    assert torch.equal(start, inputs["stm0"]), "the old memory was changed in place"


GATES = sorted({key.rsplit(".out", 1)[0] for key in vectors("gates") if key.endswith(".out")})


@pytest.mark.parametrize("name", GATES)
def test_residual_gates(name):
    expected = vectors("gates")
    kind, slots, activation, status = name.split(".")
    gate_config = {"kind": kind, "per_slot": slots == "slot", "activation": activation, "status": status}
    raw = CONFIG.model_dump() | {
        "memory_attention": {"variant": "simple", "attention": {"query_heads": 8, "kv_heads": 8}, "gate": gate_config}
    }
    config = ModelConfig.model_validate(raw)
    gate = ResidualGate(config, config.memory_attention.gate)
    names = {"gate": "weight", "gate.weight": "linear.weight", "gate.bias": "linear.bias"}
    names |= {f"slot_status.{field}": f"status.{field}" for field in ("weight", "bias")}
    state = {names[key]: value for key, value in part_of(expected, f"{name}.w.").items()}
    gate.load_state_dict(state, strict=kind != "static")
    old, new = expected["old"], expected["new"]
    weighed, gate_BS1 = gate(old, new)
    assert_close(weighed, expected[f"{name}.out"], name)
    # The gate that is told is the one by which the memory was weighed.
    share = {"sigmoid": gate_BS1, "tanh": 1 + gate_BS1}[activation]
    rest = {"sigmoid": 1 - gate_BS1, "tanh": 1 - gate_BS1}[activation]
    assert_close(share * new + rest * old if kind != "none" else old + new, expected[f"{name}.out"], f"gate of {name}")
