"""What torch.compile gains on a training step: compiled and uncompiled steps in turn, in one process.

Both do the same work on the same weights (see our_training_step.py); their order changes from pair to pair. Prints the
median of each, the ratio, and how many forms were compiled in the timed steps (0 unless something is wrong).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from our_training_step import make_engine, random_batch
from torch._dynamo.utils import counters

from rxt_dist.model.fused import compile_chains

WARMUP_PAIRS = 2


def main() -> None:
    """Parse the arguments, warm up, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file of configs/model")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--pairs", type=int, default=9, help="timed steps of either kind")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()

    tokens = arguments.rows * arguments.length
    engine, stage, rates = make_engine(arguments.model, tokens, arguments.precision)
    config = stage.run
    generator = np.random.default_rng(0)
    seconds: dict[str | None, list[float]] = {None: [], "inductor": []}
    compiled = 0
    for pair in range(WARMUP_PAIRS + arguments.pairs):
        if pair == WARMUP_PAIRS:
            compiled = counters["stats"]["unique_graphs"]
        for backend in (None, "inductor") if pair % 2 else ("inductor", None):
            compile_chains(backend)
            batch = random_batch(generator, config.model.vocab_size, arguments.rows, arguments.length, pair)
            micro = stage.prepare(batch, 0)
            start = time.perf_counter()
            engine.train_step([micro], rates)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[backend].append(time.perf_counter() - start)
    plain, fused = (statistics.median(seconds[backend][WARMUP_PAIRS:]) for backend in (None, "inductor"))
    new = counters["stats"]["unique_graphs"] - compiled
    print(
        f"{config.model.name} {arguments.precision}: uncompiled {plain:.3f} s, compiled {fused:.3f} s, {new} new forms"
    )
    print(f"uncompiled / compiled: {plain / fused:.2f}")


if __name__ == "__main__":
    main()
