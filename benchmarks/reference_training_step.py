"""Time a training step of the public reference package; prints one JSON object.

Runs inside the environment that benchmarks/training_step.py makes, where the package is installed and this project is
not; benchmarks/gpu.py starts it on a GPU where the package is at hand. The step is the package's own
`JointTrainingModel`, called as its trainer calls it with default settings: encoder on masked ids, MLM loss, the
encoder's layers detached and noised as the decoder's memory, next-token loss; then backward, clipping and AdamW. One
process, no balance loss, rows without padding. Its experts run as a loop, or batched if asked. bfloat16 is autocast,
as its trainer does it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from rxlm.rxt.models import RxTDecoder, RxTEncoder
from rxlm.training.models import JointTrainingModel, MLMHead

WARMUP_STEPS = 2
MASK_ID = 4
# Ids below are special tokens.
FIRST_ORDINARY_ID = 11
IGNORED = -100
MLM_PROBABILITY = 0.15


def common_arguments(shape: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments that the two components share, from a file of configs/model."""
    return {
        "num_layers": shape["layers"],
        "vocab_size": shape["vocab_size"],
        "embed_dim": shape["dim"],
        "att_heads": shape["heads"],
        "seq_len": shape["seq_len"],
        "stm_size": shape["stm_slots"],
        "rope_base": shape["rope_base"],
        "self_att_type": "sqa",
        "cross_att_type": "sqa",
        "ff_activation": "silu",
        "use_gated": True,
    }


def build(shape: dict[str, Any], vectorized: bool) -> JointTrainingModel:
    """The reference's model of the given shape, with one embedding for both components.

    vectorized: its experts as batched products, its default on GPUs, instead of a loop. The loop gives shared experts
        the width of routed ones, whatever it is told, and so has a little less to do at RxT-Beta's shape.
    """
    decoder_shape, encoder_shape = shape["decoder"], shape["encoder"]
    moe = decoder_shape["moe"]
    encoder = RxTEncoder(
        **common_arguments(shape),
        ff_dim=encoder_shape["hidden"],
        att_query_groups=encoder_shape["attention"]["query_heads"],
        att_groups=encoder_shape["attention"]["kv_heads"],
        use_attention_output_bias=encoder_shape["attention_bias"],
        use_gated_attention=encoder_shape["attention"].get("gated", False),
        skip_memory_cross_attention=True,
    )
    decoder = RxTDecoder(
        **common_arguments(shape),
        ff_dim=moe["hidden"],
        att_query_groups=decoder_shape["self_attention"]["query_heads"],
        att_groups=decoder_shape["self_attention"]["kv_heads"],
        cross_att_query_groups=decoder_shape["cross_attention"]["query_heads"],
        cross_att_groups=decoder_shape["cross_attention"]["kv_heads"],
        use_attention_output_bias=decoder_shape["attention_bias"],
        use_gated_attention=decoder_shape["self_attention"].get("gated", False),
        use_gated_cross_attention=False,
        use_moe=True,
        num_experts=moe["experts"],
        moe_top_k=moe["active"],
        num_shared_experts=moe.get("shared_experts", 0),
        shared_expert_dim=moe.get("shared_hidden"),
        stateless_layers_config=decoder_shape.get("stateless_before"),
        final_stateless_layers_config=decoder_shape.get("stateless_after"),
        dense_layer_dim=decoder_shape.get("dense_hidden", 0),
        use_vectorized_moe=vectorized,
        use_head_norm=decoder_shape["head_norm"] != "none",
        head_norm_type="rms_norm",
    )
    decoder.load_shared_embedding(encoder.model.embedding)
    head = MLMHead(shape["dim"], shape["vocab_size"])
    return JointTrainingModel(encoder, decoder, head, noise_level=0.5, masking_prob=0.15)


def step(model: JointTrainingModel, optimizer: torch.optim.Optimizer, ids_BT: torch.Tensor, bfloat16: bool) -> float:
    """One optimizer step on rows of ids; returns the sum of both losses."""
    masked_BT = torch.rand(ids_BT.shape, device=ids_BT.device) < MLM_PROBABILITY
    with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bfloat16):
        mlm_logits_BTV, logits_BTV = model(ids_BT.masked_fill(masked_BT, MASK_ID), ids_BT)
        mlm = F.cross_entropy(mlm_logits_BTV.flatten(0, 1), ids_BT.masked_fill(~masked_BT, IGNORED).flatten())
        ar = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        loss = mlm + ar
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main() -> None:
    """Parse the arguments, warm up, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file of configs/model")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens in a row")
    parser.add_argument("--steps", type=int, required=True, help="timed steps, after two that are not timed")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectorized", action="store_true", help="experts as batched products instead of a loop")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="a field of the model file")
    arguments = parser.parse_args()

    shape = yaml.safe_load(arguments.model.read_text())
    for change in arguments.set:
        *path, name = change.partition("=")[0].split(".")
        place = shape
        for step_down in path:
            place = place[step_down]
        place[name] = int(change.partition("=")[2])
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = build(shape, arguments.vectorized).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    seconds, losses = [], []
    for _ in range(WARMUP_STEPS + arguments.steps):
        size = (arguments.rows, arguments.length)
        ids_BT = torch.randint(FIRST_ORDINARY_ID, shape["vocab_size"], size, device=arguments.device)
        began = time.perf_counter()
        losses.append(step(model, optimizer, ids_BT, arguments.precision == "bfloat16"))
        seconds.append(time.perf_counter() - began)
    timed = seconds[WARMUP_STEPS:]
    tokens = arguments.rows * arguments.length
    print(
        json.dumps(
            {
                "tokens_per_s": tokens / statistics.median(timed),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "step_seconds": timed,
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
                "losses": losses,
                "decoder_parameters": sum(value.numel() for value in model.decoder.parameters()),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
