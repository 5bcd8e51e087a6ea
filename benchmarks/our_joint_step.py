"""Time our joint training step; prints one JSON object. The other side is benchmarks/reference_joint_step.py.

The step is `PlainEngine.train_step` as `rxt-dist train` calls it: masking for the MLM loss, encoder, noised memory,
decoder, both losses, balance and z-loss, backward, clipping and AdamW. One process, rows without padding.
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

from rxt_dist.config.load import load_model
from rxt_dist.config.run import OptimizerConfig, StageConfig, TrainConfig
from rxt_dist.data.loader import Batch, host_batch
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.engine.build import choose_device
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.joint import JointStage

WARMUP_STEPS = 2
LEARNING_RATE = 3e-4


def random_batch(generator: np.random.Generator, vocabulary: int, rows: int, length: int, step: int) -> Batch:
    """Rows of random ordinary tokens, each row one document."""
    tokens_RT = generator.integers(SPECIAL_COUNT, vocabulary, (rows, length)).astype(np.uint16)
    narrow = torch.from_numpy(tokens_RT.view(np.int16))
    samples = np.arange(rows) + step * rows
    read = host_batch(narrow, np.full(rows, 1), np.full(rows, length), np.zeros(rows, np.int64), samples)
    return read.to(torch.device("cpu"))


def main() -> None:
    """Parse the arguments, warm up, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file of configs/model")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens in a row")
    parser.add_argument("--steps", type=int, required=True, help="timed steps, after two that are not timed")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    arguments = parser.parse_args()

    # The joint stage has no use for the memory attention; the reference's joint model is built without it too.
    config = load_model(arguments.model, []).model_copy(update={"memory_attention": None})
    model = ReactiveTransformer(config)
    initialise(model, 0)
    tokens = arguments.rows * arguments.length
    train = TrainConfig(total_tokens=10**9, global_batch_tokens=tokens, precision=arguments.precision)
    stage = JointStage(model, StageConfig(), 0, train.logit_chunk_tokens)
    engine = PlainEngine(stage, train, OptimizerConfig(), choose_device(local_rank=0))
    generator = np.random.default_rng(0)
    seconds, losses = [], []
    for step in range(WARMUP_STEPS + arguments.steps):
        batch = random_batch(generator, config.vocab_size, arguments.rows, arguments.length, step)
        began = time.perf_counter()
        result = engine.train_step([stage.prepare(batch, step * tokens)], LEARNING_RATE)
        seconds.append(time.perf_counter() - began)
        means_T = result.totals.sums_T / result.totals.counts_T
        losses.append(means_T[:2].sum().item())
    timed = seconds[WARMUP_STEPS:]
    print(
        json.dumps(
            {
                "tokens_per_s": tokens / statistics.median(timed),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "step_seconds": timed,
                "losses": losses,
                "decoder_parameters": sum(value.numel() for value in model.decoder.parameters()),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
