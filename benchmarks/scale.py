"""What every rank of a run does at its start, in a save and in a load, at several numbers of ranks.

Starts 2, 4 and 8 gloo ranks of ZeRO-3 on this machine, with the layers of RxT-Beta at a small width (as many named
parameters as the real one has), and prints for each phase the processor seconds of a rank (the largest of all ranks)
and the bytes of Python objects that a rank receives. What grows with the ranks here will grow on.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "vocab_size=512", "dim=32", "heads=4", "seq_len=32", "stm_slots=8",
    "decoder.self_attention={query_heads: 2, kv_heads: 1, gated: true}",
    "decoder.cross_attention={query_heads: 2, kv_heads: 1}",
    "decoder.moe.experts=16", "decoder.moe.active=2", "decoder.moe.hidden=16", "decoder.moe.shared_hidden=16",
    "decoder.dense_hidden=32", "encoder.attention={query_heads: 2, kv_heads: 2}", "encoder.hidden=32",
    "memory_attention.attention={query_heads: 2, kv_heads: 1}",
)  # fmt: skip


def main() -> None:
    """Start the ranks of each number, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    columns = {ranks: _measure(ranks) for ranks in parser.parse_args().ranks}
    print("| per rank | " + " | ".join(f"{ranks} ranks" for ranks in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{column[name]:,.4g}" for column in columns.values()) + " |")


def _measure(ranks: int) -> dict[str, float]:
    """The largest figure of all ranks, by name."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        log = stack.enter_context(open(Path(folder) / "log", "w+"))
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", folder],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
                stderr=log,
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            log.seek(0)
            sys.exit(f"a rank of {ranks} failed:\n{log.read()[-4000:]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(one[name] for one in found) for name in found[0]}


def rank(folder: Path) -> None:
    """One rank: every phase once, its figures into a file."""
    figures: dict[str, float] = {}
    begun = time.process_time()
    import torch

    from rxt_dist.checkpoint.frozen import FrozenWeights
    from rxt_dist.checkpoint.state import load_state, save_state
    from rxt_dist.checkpoint.store import CheckpointStore
    from rxt_dist.config.load import load_model, load_run
    from rxt_dist.engine.build import build_engine, joined_ranks
    from rxt_dist.engine.collectives import Collectives
    from rxt_dist.model.init import initialise
    from rxt_dist.stages.base import build_network, stage_class

    figures["imports, s"] = time.process_time() - begun
    device = torch.device("cpu")
    model = load_model(ROOT / "configs/model/rxt-beta.yaml", list(SMALL))
    config = load_run(
        ROOT / "configs/run/demo.yaml", ["parallel={engine: deepspeed, zero: 3}", "train.precision=float32"]
    )
    config = config.model_copy(update={"model": model})
    with joined_ranks(device, plain=False) as group:
        with phase("join", figures, Collectives):
            group.gather(None)
        with phase("build and initialise", figures, Collectives):
            stage = stage_class(config)(build_network(config), config)
            initialise(stage.model, config.seed)
            frozen = FrozenWeights(stage.model, group)
        with phase("engine", figures, Collectives):
            engine = build_engine(stage, config, device)
        store = CheckpointStore(folder / "checkpoints", 2)
        with phase("save", figures, Collectives):
            save_state(engine, frozen, store, 1, {})
        checkpoint = store.read(1)
        with phase("load", figures, Collectives):
            load_state(engine, frozen, checkpoint, 0)
        figures["parameters by name"] = sum(1 for _ in stage.model.named_parameters())
        figures["files of a checkpoint"] = len(checkpoint.files)
        figures["bytes of its manifest"] = max(path.stat().st_size for path in checkpoint.path.glob("*.json"))
        engine.close()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(figures))


@contextmanager
def phase(name: str, figures: dict[str, float], group: type) -> Iterator[None]:
    """Processor seconds of the block, and the bytes of what `gather` gave to this rank in it."""
    received = 0

    def counted(collectives: Any, value: Any) -> list[Any]:
        nonlocal received
        values = gather(collectives, value)
        received += sum(len(pickle.dumps(one)) for one in values)
        return values

    gather, begun = group.gather, time.process_time()
    group.gather = counted
    yield
    group.gather = gather
    figures[f"{name}, s"] = time.process_time() - begun
    figures[f"{name}: objects received, bytes"] = received


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank(Path(sys.argv[2]))
    else:
        main()
