"""Two processes, one a device, that train the tiny model together. Run as a script, this file is one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RANKS = 2
_SECONDS = 240


def expert_parallel_losses(folder: Path, zero: int, steps: int) -> list[list[float]]:
    """Losses of `steps` steps with the experts split over two ranks (NCCL on GPUs, gloo in a dry run)."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    ranks = []
    for rank in range(RANKS):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "PYTHONPATH": path}
        command = [sys.executable, __file__, str(folder), str(zero), str(steps)]
        log = (folder / f"{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    try:
        codes = [rank.wait(_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(RANKS))
    assert codes == [0] * RANKS, logs
    losses: list[list[float]] = json.loads((folder / "losses.json").read_text())
    return losses


def main(folder: Path, zero: int, steps: int) -> None:
    """Be one rank; rank 0 writes the losses."""
    from rxt_dist.lasting import lasting_imports

    with lasting_imports():
        import torch
        import torch._dynamo
        from place import DRY
        from steps import LR, prepared
        from tiny import ROWS, TOKENS, packed_batch

        from rxt_dist.engine.build import build_engine

    rank = int(os.environ["RANK"])
    device = torch.device("cpu") if DRY else torch.device("cuda", rank)
    if DRY:
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(device)
    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    torch.distributed.init_process_group("gloo" if DRY else "nccl", store=store, rank=rank, world_size=RANKS)
    stage, config = prepared(zero=zero, expert_parallel=RANKS)
    engine = build_engine(stage, config, device)
    losses = []
    for step in range(steps):
        part = packed_batch(step).micro_batches(ROWS // RANKS)[rank]
        result = engine.train_step([stage.prepare(part, step * ROWS * TOKENS)], dict.fromkeys(stage.rates(0), LR))
        losses.append((result.totals.sums_J / result.totals.counts_J).tolist())
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    engine.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
