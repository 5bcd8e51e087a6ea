"""What a save in the background costs training, and how fast a checkpoint is verified and loaded.

    python benchmarks/async_save.py --gigabytes 2 --folder DISK

A state of that size is saved while training waits, and in the background while steps of matrix products go on; then it
is verified and loaded with nothing of it in the system's cache. Every figure stands beside one of the same process: the
synchronous save, steps without a save, steps beside a plain write of as many bytes by one thread, and the disk's own
sequential rates. The copy is made beside the first step, whose end waits for it as an update does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.checkpoint.verified import load_verified
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import KINDS, Fragment

CPU = torch.device("cpu")
# Elements of one parameter, as many as an expert's matrices of RxT-Beta have.
PARAMETER = 1 << 21
BLOCK = 1 << 22
# Steps without a save, at least, that others are compared with.
_QUIET_STEPS = 5


class State:
    """An engine that holds weights and moments, and trains nothing."""

    def __init__(self, size: int) -> None:
        self.ranks, self.device = Collectives(CPU), CPU
        count = max(1, size // (4 * len(KINDS) * PARAMETER))
        self.held = [
            Fragment(f"p{number}", 0, {kind: torch.randn(PARAMETER) for kind in KINDS}) for number in range(count)
        ]

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """All of it."""
        yield from self.held

    def frozen_fragments(self) -> Iterator[Fragment]:
        """None."""
        yield from ()

    def routing_state(self) -> dict[str, torch.Tensor]:
        """Something."""
        return {"expert_counts": torch.zeros(8, dtype=torch.int64)}

    def finish_load(self, steps: int, routing: Any) -> None:
        """Nothing is derived from the state."""


def main() -> None:
    """Measure, print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measure(State(int(given.gigabytes * 1e9)), Path(folder), given.rounds)
    if given.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"| {name} | {value:.3g} |")


def measure(engine: Any, folder: Path, rounds: int) -> dict[str, float]:
    """All figures by name: the median of rounds, each of which measures everything once. Ratios are of one round."""
    frozen = FrozenWeights(torch.nn.Module(), engine.ranks)
    frozen.model_names = {fragment.name for fragment in engine.held}
    store = CheckpointStore(folder / "checkpoints", 2)
    saves = BackgroundSaves(engine, frozen, store)
    first = behind(saves, 1)["stall, s"]
    found = [one_round(engine, frozen, store, saves, folder, number) for number in range(1, rounds + 1)]
    saves.close(0)
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {"first stall (memory is new), s": first, **medians}


def one_round(
    engine: Any, frozen: FrozenWeights, store: CheckpointStore, saves: BackgroundSaves, folder: Path, number: int
) -> dict[str, float]:
    """Disk, synchronous save, save in the background, verification and load, one after another."""
    size = sum(4 * tensor.numel() for fragment in engine.held for tensor in fragment.tensors.values()) / 1e9
    written = disk_writes(folder / "plain", int(size * 1e9))
    saving = time.process_time()
    waited = seconds(lambda: save_state(engine, frozen, store, 2 * number, {}))
    saving = time.process_time() - saving
    figures = behind(saves, 2 * number + 1)
    checkpoint = store.read(2 * number + 1)
    files = [checkpoint.path / file.name for file in checkpoint.files]
    read_uncached(files)  # Once more than is measured: memory that a virtual machine has not used for long is slow.
    read = size / seconds(lambda: read_uncached(files))
    drop(files)
    loading = time.process_time()
    loaded = seconds(lambda: load_verified(engine, frozen, store, checkpoint, 1))
    loading = time.process_time() - loading
    # Last, since what a virtual machine does with the memory of so large a file is met by whatever reads after it.
    plain = beside_a_plain_write(folder / "plain", int(size * 1e9)) / figures["step without a save, s"]
    return {
        "state, GB": size,
        "disk writes, GB/s": written,
        "disk reads, GB/s": read,
        "sha256 of what is in memory, one processor, GB/s": hashing(),
        "synchronous save, s": waited,
        "synchronous save, processor seconds a GB": saving / size,
        **figures,
        "step beside a plain write, slowest / median without": plain,
        "stall / synchronous save": figures["stall, s"] / waited,
        "verify and load, GB/s": size / loaded,
        "verify and load, processor seconds a GB": loading / size,
        "verify and load / disk reads": size / loaded / read,
    }


def behind(saves: BackgroundSaves, number: int) -> dict[str, float]:
    """The stall of a save in the background, and what steps beside it take; then as many steps without one."""
    stall = seconds(lambda: saves.start(number, {}))
    beside_copy = seconds(step)
    stall += seconds(saves.before_update)
    busy = [seconds(step)]
    while saves.outcome is None:
        busy.append(seconds(step))
    outcome = saves.wait()
    assert outcome.error is None, outcome.error
    quiet = [seconds(step) for _ in range(max(len(busy), _QUIET_STEPS))]
    usual = statistics.median(quiet)
    return {
        "stall, s": stall,
        "until it is committed, s": outcome.seconds,
        "step without a save, s": usual,
        "step beside the copy / median without": beside_copy / usual,
        "step without a save, slowest / median": max(quiet) / usual,
        "step beside a save, median / without": statistics.median(busy) / usual,
        "step beside a save, slowest / median without": max(busy) / usual,
    }


def beside_a_plain_write(path: Path, size: int) -> float:
    """Seconds of the slowest step while a thread writes as many bytes and does nothing else."""
    writing = threading.Thread(target=disk_writes, args=(path, size), daemon=True)
    writing.start()
    busy = [seconds(step)]
    while writing.is_alive():
        busy.append(seconds(step))
    return max(busy)


def step() -> None:
    """Forward and backward pass of a training on CPU: about half a second of matrix products."""
    matrix = torch.ones(640, 640)
    for _ in range(60):
        matrix = matrix @ matrix / 640


def disk_writes(path: Path, size: int) -> float:
    """10^9 bytes a second that this disk writes one after another, with fsync."""
    block = os.urandom(BLOCK)

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(size // BLOCK):
                file.write(block)
            os.fsync(file.fileno())

    written = seconds(write)
    path.unlink()
    return size / 1e9 / written


def read_uncached(files: Sequence[Path]) -> None:
    """Read files one after another from the disk, and do nothing with what is read."""
    drop(files)
    room = bytearray(BLOCK)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(room):
                pass


def hashing() -> float:
    """10^9 bytes a second of sha256, which no verification can pass on one processor."""
    block = bytes(BLOCK)
    digest = hashlib.sha256()
    return 32 * BLOCK / 1e9 / seconds(lambda: [digest.update(block) for _ in range(32)])


def drop(files: Sequence[Path]) -> None:
    """Take files out of the system's cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], Any]) -> float:
    """What an action takes."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
