"""What the public reference package computes with an export; started by exchange.py in an environment of its own.

    PYTHON reference_exchange.py EXPORT INPUTS OUTPUTS [--save FOLDER] [--bfloat16]

EXPORT is a folder that `rxt-dist export --format rxlm` made: a whole system, or a folder for each part. INPUTS holds
the ids of a prompt, of an interaction, and a memory. OUTPUTS gets logits, next memory, and the ids of a greedy answer,
each token computed from the whole sequence, since the package's cached path gives other ones. The package saves the
system into FOLDER in its own way, from bfloat16 weights if asked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import rxlm.rxt.models as models
import torch
from rxlm.training.models import MLMHead
from safetensors.torch import load_file, save_file

ANSWER_TOKENS = 12
MEMORY_CLASSES = {
    "simple": models.RxTSimpleMemoryAttention,
    "self": models.RxTSelfMemoryAttention,
    "interlayer": models.RxTInterlayerMemoryAttention,
    "self-interlayer": models.RxTSelfInterlayerMemoryAttention,
    "grouped": models.RxTGroupedSelfInterlayerMemoryAttention,
}


def load(export: Path, variant: str) -> dict[str, Any]:
    """The parts, by name."""
    parts: dict[str, Any] = {}
    if (export / "config.json").is_file():
        whole = models.RxTBeta.from_pretrained(str(export), tokenizer=None)
        whole.share_components()
        parts = {name: getattr(whole, name) for name in ("decoder", "encoder", "memory_attention")}
        parts["whole"] = whole
    else:
        classes = {
            "decoder": models.RxTDecoder,
            "encoder": models.RxTEncoder,
            "memory_attention": MEMORY_CLASSES.get(variant),
        }
        for name, kind in classes.items():
            if (export / name).is_dir():
                parts[name] = kind.from_pretrained(str(export / name))
    if (export / "mlm_head").is_dir():
        parts["mlm_head"] = MLMHead.from_pretrained(str(export / "mlm_head"))
    return {name: part.eval() for name, part in parts.items()}


@torch.no_grad()
def compute(parts: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, memory and greedy answer."""
    decoder, found = parts["decoder"], {}

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        decoder.model.stm.memory = inputs["memory"].clone()
        out = decoder(ids, attention_mask=torch.ones_like(ids))
        return out[0] if isinstance(out, tuple) else out

    prompt = inputs["prompt"]
    found["logits"] = logits_of(prompt).contiguous()
    said = prompt
    for _ in range(ANSWER_TOKENS):
        said = torch.cat([said, logits_of(said)[:, -1:].argmax(-1)], dim=1)
    found["said"] = said[:, prompt.shape[1] :].contiguous()
    if "encoder" in parts:
        ids = inputs["interaction"]
        encoded, stacked = parts["encoder"](ids, attention_mask=torch.ones_like(ids))
        if "mlm_head" in parts:
            found["mlm"] = parts["mlm_head"](encoded).contiguous()
        if "memory_attention" in parts:
            memory = parts["memory_attention"]
            memory.load_shared_memory(decoder.model.stm)
            decoder.model.stm.memory = inputs["memory"].clone()
            memory(stacked, attention_mask=torch.ones_like(ids))
            found["next_memory"] = decoder.model.stm.memory.clone().contiguous()
    return found


def save(parts: dict[str, Any], folder: Path, bfloat16: bool) -> None:
    """As the package saves: a whole system in one folder, else one for each part."""
    for name, part in parts.items():
        if "whole" in parts and name not in ("whole", "mlm_head"):
            continue
        saved = part.bfloat16() if bfloat16 else part
        saved.save_pretrained(str(folder if name == "whole" else folder / name))


def main() -> None:
    """Load, compute, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--variant", default="grouped", help="of the memory attention, where parts are loaded")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(1)  # what is not loaded must not be equal by chance
    parts = load(arguments.export, arguments.variant)
    found = compute(parts, load_file(arguments.inputs))
    save_file(found, arguments.outputs)
    if arguments.save:
        save(parts, arguments.save, arguments.bfloat16)
    print(json.dumps({name: list(value.shape) for name, value in found.items()}))


if __name__ == "__main__":
    main()
