"""Exports of the published shapes, tried in the public reference package, and back.

    python benchmarks/exchange.py --reference PYTHON [--shape nano ...]

PYTHON is the interpreter of an environment with `rxlm` 0.3.80 (benchmarks/training_step.py makes one; it has a
non-commercial licence and is no dependency). Random weights of each shape become a run, the run an export of format
rxlm. The package loads it, computes logits, a written memory and a greedy answer, and saves it in its own way, in
float32 and in bfloat16; `rxt-dist import` takes both. Prints for each shape: the largest difference of logits and
memory from ours, relative to the largest value; whether the greedy ids are equal; whether the weights come back
bit-equal (bfloat16: as rounded once); and whether the package computes the same bits again after import and export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from byte_tokenizer import byte_tokenizer  # noqa: E402
from saved_run import whole_stage, write_run  # noqa: E402

from rxt_dist.checkpoint.export import Wanted, export_run  # noqa: E402
from rxt_dist.checkpoint.importing import import_published  # noqa: E402
from rxt_dist.config.load import load_model  # noqa: E402
from rxt_dist.inference.generate import Row, answer, write  # noqa: E402
from rxt_dist.inference.load import load_network  # noqa: E402
from rxt_dist.inference.sampling import Sampling  # noqa: E402
from rxt_dist.model.init import initialise  # noqa: E402
from rxt_dist.model.reactive import ReactiveTransformer  # noqa: E402

# `beta` has RxT-Beta's widths, experts and kinds of layers, three stateful ones of them and a small vocabulary: 3 GB
# instead of 12. `single` has one shared expert, `simple` the plainest memory.
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "nano": ("rxt-alpha-nano", ()),
    "mini": ("rxt-alpha-mini", ()),
    "micro": ("rxt-beta-micro", ("layers=4", "seq_len=128", "stm_slots=64")),
    "demo": ("demo", ()),
    "beta": ("rxt-beta", ("layers=3", "vocab_size=4096", "seq_len=128", "stm_slots=64")),
    "single": ("demo", ("decoder.moe.shared_experts=1", "decoder.moe.shared_bias=local", "decoder.head_norm=layer")),
    "simple": ("demo", ("memory_attention={variant: simple, attention: {query_heads: 4, kv_heads: 4}}",)),
    "self": ("demo", ("memory_attention={variant: self, attention: {query_heads: 4, kv_heads: 4}}",)),
}
PROMPT = (2, 5, 51, 28, 25, 68, 25, 6)
ANSWER_TOKENS = 12


def network_of(shape: str) -> ReactiveTransformer:
    """Random weights, biases too, computed as the reference does (norm_eps null)."""
    file, overrides = SHAPES[shape]
    network = ReactiveTransformer(load_model(ROOT / f"configs/model/{file}.yaml", ["norm_eps=null", *overrides]))
    initialise(network, 0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


def computed(network: ReactiveTransformer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same three things as the reference's side."""
    prompt = inputs["prompt"]
    with torch.no_grad():
        positions = torch.arange(prompt.shape[1])[None]
        hidden = network.decoder(network.embedding(prompt), positions, inputs["memory"]).hidden_BTD
        found = {"logits": network.lm_head.logits(hidden)}
    ids = prompt[0].tolist()
    row = Row(
        ids[:-1],
        ids[-1],
        Sampling(max_tokens=ANSWER_TOKENS, suppress=False),
        torch.Generator(),
        frozenset(),
    )
    for _ in answer(network, inputs["memory"], [row]):
        pass
    found["said"] = torch.tensor([row.said[1:]])
    if network.memory_attention is not None:
        found["next_memory"] = write(network, inputs["memory"], inputs["interaction"].tolist())
    if network.encoder is not None and network.mlm_head is not None:
        ids_BT = inputs["interaction"]
        with torch.no_grad():
            encoded = network.encoder(network.embedding(ids_BT), torch.arange(ids_BT.shape[1])[None])
            found["mlm"] = network.mlm_head.logits(encoded[-1])
    return found


def reference(python: Path, export: Path, inputs: Path, outputs: Path, variant: str, *more: str) -> dict[str, Any]:
    """What the package computes."""
    script = ROOT / "benchmarks/reference_exchange.py"
    command = [str(python), str(script), str(export), str(inputs), str(outputs), "--variant", variant, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return load_file(outputs)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((one - other).abs().max() / other.abs().max()).item()


def try_shape(shape: str, python: Path, folder: Path) -> dict[str, Any]:
    """All comparisons of one shape."""
    network = network_of(shape)
    config = network.config
    variant = config.memory_attention.variant if config.memory_attention else "none"
    generator = torch.Generator().manual_seed(3)
    interaction = torch.randint(11, 70, (1, 20), generator=generator)
    memory = torch.randn(config.layers, 1, config.stm_slots, config.dim, generator=generator)
    inputs = {"prompt": torch.tensor([PROMPT]), "interaction": interaction, "memory": memory}
    save_file(inputs, folder / "inputs")
    stage = "whole" if config.memory_attention else "decoder-only"
    run = write_run(folder / "run", network, stage)
    tokenizer = byte_tokenizer(folder / "tokenizer.json")
    said: list[str] = []
    export_run(Wanted(run, folder / "export", "rxlm", tokenizer=tokenizer), said.append)
    theirs = reference(
        python, folder / "export", folder / "inputs", folder / "out", variant, "--save", str(folder / "full")
    )
    ours = computed(network, inputs)
    result: dict[str, Any] = {"shape": shape, "parameters": sum(p.numel() for p in network.parameters())}
    for name in ("logits", "next_memory", "mlm"):
        if name in ours:
            result[name] = relative(ours[name], theirs[name])
    result["same_ids"] = bool(torch.equal(ours["said"], theirs["said"]))
    reference(
        python,
        folder / "export",
        folder / "inputs",
        folder / "out",
        variant,
        *("--save", str(folder / "half"), "--bfloat16"),
    )
    result["bit_equal_after_import"] = equal_after_import(network, folder, "full", tokenizer)
    result["bit_equal_after_bfloat16"] = equal_after_import(network, folder, "half", tokenizer)
    back, _ = load_network(folder / "imported-full")
    again = write_run(folder / "again", back, stage)
    export_run(Wanted(again, folder / "export2", "rxlm", tokenizer=tokenizer), said.append)
    theirs_again = reference(python, folder / "export2", folder / "inputs", folder / "out", variant)
    result["same_bits_again"] = all(torch.equal(theirs[name], theirs_again[name]) for name in theirs)
    return result


def equal_after_import(network: ReactiveTransformer, folder: Path, saved: str, tokenizer: Path) -> bool:
    """Whether `rxt-dist import` gives back every weight of what the package saved."""
    lines: list[str] = []
    import_published([folder / saved], folder / f"imported-{saved}", tokenizer, "float32", lines.append)
    back, _ = load_network(folder / f"imported-{saved}")
    wanted = {name: value.detach() for name, value in network.named_parameters()}
    if saved == "half":
        wanted = {name: value.bfloat16().float() for name, value in wanted.items()}
    found = dict(back.named_parameters())
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def main() -> None:
    """Try all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="interpreter of an environment with rxlm 0.3.80")
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    with whole_stage():
        for shape in arguments.shape:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(try_shape(shape, arguments.reference, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
