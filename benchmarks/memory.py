"""Memory of each rank of a run on this machine's CPU, beside what `rxt-dist plan` says of it.

    python benchmarks/memory.py [--experts 48] [--topology 2:3:2 ...] [a.b=c ...]

A topology is ranks:ZeRO stage:expert parallelism, or `plain`. The model is the demo's with width 512, 16 heads, two
stateful layers and experts of 192, ten of them active, in float32: 53M parameters with 48 experts, 351M with 384. Each
rank is a fresh process, which is set up as `rxt-dist train` does it, makes four steps of eight rows of 256 random
tokens, and saves. `a.b=c` changes the run. The peak of its resident memory is read after each part and begun anew
(Linux). 351M parameters take 12 GB in all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = ("plain", "1:1:1", "1:3:1", "2:0:1", "2:1:1", "2:3:1", "2:3:2")
ROWS, LENGTH, STEPS = 8, 256, 4
MODEL = (
    "model.dim=512",
    "model.heads=16",
    "model.layers=2",
    "model.decoder.moe.active=10",
    "model.decoder.moe.hidden=192",
)
PHASES = ("set-up", "steps", "save")


def configuration(topology: str, experts: int, changes: Sequence[str]) -> Any:
    """The run of a topology, changed at last by `changes`."""
    from rxt_dist.config.load import load_run

    plain = topology == "plain"
    ranks, zero, expert_parallel = (1, 0, 1) if plain else map(int, topology.split(":"))
    own = [
        f"model.decoder.moe.experts={experts}",
        f"parallel={{engine: {'plain' if plain else 'deepspeed'}, zero: {zero}, expert_parallel: {expert_parallel}}}",
        f"cluster.gpus_per_node={ranks}",
        f"data.seq_len={LENGTH}",
        f"train.global_batch_tokens={ROWS * LENGTH}",
        f"train.micro_batch_rows={ROWS // 2}",
    ]
    return load_run(ROOT / "configs/run/demo.yaml", [*MODEL, *own, *changes])


def peak() -> int:
    """Peak of this process's resident memory since it was last asked, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return found


def measure_rank(topology: str, experts: int, changes: Sequence[str], folder: Path) -> None:
    """Be one rank; prints its peaks by phase as one JSON line."""
    import numpy as np
    import torch
    from our_training_step import random_batch

    from rxt_dist.checkpoint.frozen import FrozenWeights
    from rxt_dist.checkpoint.state import save_state
    from rxt_dist.checkpoint.store import CheckpointStore
    from rxt_dist.engine.build import build_engine, choose_device, joined_ranks
    from rxt_dist.model.init import InitialWeights
    from rxt_dist.stages.base import build_network, stage_class
    from rxt_dist.train.resume import Beginning, set_weights

    config = configuration(topology, experts, changes)
    device = choose_device(local_rank=0)
    peaks = []
    with joined_ranks(device, topology == "plain") as group:
        with torch.device("meta"):
            stage = stage_class(config)(build_network(config), config)
        initial, frozen = InitialWeights(stage.model, config.seed), FrozenWeights(stage.model, group)
        engine = build_engine(stage, config, device)
        set_weights(engine, frozen, config, initial, Beginning())
        peaks.append(peak())
        generator = np.random.default_rng(0)
        for step in range(STEPS):
            rows, length = config.train.global_batch_tokens // config.data.seq_len, config.data.seq_len
            batch = random_batch(generator, config.model.vocab_size, rows, length, step)
            parts = batch.micro_batches(config.train.micro_batch_rows)
            share = len(parts) // group.world_size
            mine = parts[group.rank * share : (group.rank + 1) * share]
            result = engine.train_step([stage.prepare(part, 0) for part in mine], {"all": 1e-3})
            assert result.applied
        peaks.append(peak())
        save_state(engine, frozen, CheckpointStore(folder / "checkpoints", 2), STEPS, {})
        peaks.append(peak())
        print(json.dumps(peaks))
        engine.close()


def measure(topology: str, experts: int, changes: Sequence[str]) -> dict[str, Any]:
    """The largest peak of any rank in each phase, the plan's figure, and their ratio."""
    from rxt_dist.plan.memory import memory_per_gpu
    from rxt_dist.plan.setting import Setting

    config = configuration(topology, experts, changes)
    ranks = config.cluster.ranks
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, __file__, "--be-rank", topology, "--experts", str(experts), "--folder", folder]
            command += changes
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{topology}: exit codes {[process.returncode for process in running]}")
    peaks = [json.loads(output.splitlines()[-1]) for output in outputs]
    planned = memory_per_gpu(Setting.of(config)).total
    result: dict[str, Any] = {"topology": topology, "planned": planned}
    result |= {phase: max(of_rank[index] for of_rank in peaks) for index, phase in enumerate(PHASES)}
    result["ratio"] = max(result[phase] for phase in PHASES) / planned
    return result


def main() -> None:
    """Parse the arguments, measure one topology after another, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=48, help="routed experts of a layer (default 48)")
    parser.add_argument("--topology", action="append", help=f"may be repeated; default: {' '.join(TOPOLOGIES)}")
    parser.add_argument("changes", nargs="*", metavar="a.b=c", help="of the run, as for rxt-dist")
    parser.add_argument("--be-rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_rank:
        measure_rank(arguments.be_rank, arguments.experts, arguments.changes, arguments.folder)
        return
    print(f"| ranks:ZeRO:EP | planned GB | {' | '.join(PHASES)} | peak / planned |\n|---|---|---|---|---|---|")
    results = []
    for topology in arguments.topology or TOPOLOGIES:
        results.append(measure(topology, arguments.experts, arguments.changes))
        cells = [f"{results[-1][field] / 1e9:.2f}" for field in ("planned", *PHASES)]
        print(f"| {topology} | {' | '.join(cells)} | {results[-1]['ratio']:.2f} |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
