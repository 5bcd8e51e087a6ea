"""Time our training step; prints one JSON object. The other side is benchmarks/reference_training_step.py.

The step is `Stage.prepare` and `PlainEngine.train_step` as `rxt-dist train` calls them: masking for the MLM loss,
encoder, noised memory, decoder, both losses, balance and z-loss, backward, clipping and AdamW. One process, rows
without padding.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from rxt_dist.config.load import load_run
from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.engine.build import choose_device
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Stage, build_network, stage_class

RUN = Path(__file__).resolve().parent.parent / "configs/run/demo.yaml"
WARMUP_STEPS = 2
LEARNING_RATE = 3e-4


def random_batch(generator: np.random.Generator, vocabulary: int, rows: int, length: int, step: int) -> TokenBatch:
    """Rows of random ordinary tokens, each row one document."""
    tokens_RT = generator.integers(SPECIAL_COUNT, vocabulary, (rows, length)).astype(np.uint16)
    narrow = torch.from_numpy(tokens_RT.view(np.int16))
    samples = np.arange(rows) + step * rows
    return token_batch(narrow, np.full(rows, 1), np.full(rows, length), np.zeros(rows, np.int64), samples)


def make_engine(model_file: Path, tokens: int, precision: str) -> tuple[PlainEngine, Stage, dict[str, float]]:
    """An engine for global batches of `tokens`, its stage, and the rate of each group."""
    train = f"total_tokens: 1e9, global_batch_tokens: {tokens}, precision: {precision}"
    # The first stage with its own defaults, not the demo's; like the reference's model it has no memory attention.
    config = load_run(RUN, [f"model={model_file}", f"train={{{train}}}", "stage={}", "optimizer={}", "seed=0"])
    model = build_network(config)
    initialise(model, config.seed)
    stage = stage_class(config)(model, config)
    engine = PlainEngine(stage, config, choose_device(local_rank=0))
    rates = {group: LEARNING_RATE * factor for group, factor in stage.rates(0).items()}
    return engine, stage, rates


def main() -> None:
    """Parse the arguments, warm up, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file of configs/model")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens in a row")
    parser.add_argument("--steps", type=int, required=True, help="timed steps, after two that are not timed")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    arguments = parser.parse_args()

    tokens = arguments.rows * arguments.length
    engine, stage, rates = make_engine(arguments.model, tokens, arguments.precision)
    config = stage.run
    generator = np.random.default_rng(0)
    seconds, losses = [], []
    for step in range(WARMUP_STEPS + arguments.steps):
        batch = random_batch(generator, config.model.vocab_size, arguments.rows, arguments.length, step)
        began = time.perf_counter()
        result = engine.train_step([stage.prepare(batch, step * tokens)], rates)
        seconds.append(time.perf_counter() - began)
        means_J = result.totals.sums_J / result.totals.counts_J
        losses.append(means_J[:2].sum().item())
    timed = seconds[WARMUP_STEPS:]
    print(
        json.dumps(
            {
                "tokens_per_s": tokens / statistics.median(timed),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "step_seconds": timed,
                "losses": losses,
                "decoder_parameters": sum(value.numel() for value in stage.model.decoder.parameters()),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
