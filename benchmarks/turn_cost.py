"""What a turn costs after 0, 7 and 63 others: an RxT with its memory, beside a decoder that reads the whole history.

    OMP_NUM_THREADS=1 python benchmarks/turn_cost.py [--model demo] [--rounds 15] [--query 24] [--answer 32]

Random weights of a file of configs/model; queries and answers of fixed lengths, greedy. Conversations of 1, 8 and 64
turns are prepared; then their last turns are answered in rotation, each from the same state in every round, so that
whatever else the machine does meets all alike. The stateless model is the same decoder without its memory
cross-attention; its prompt is the whole history and the query. Prints one JSON object a turn: medians of the time to
the first token, of the time of every further one and of the whole answer, with the write of the memory (which goes on
in the background), and the bytes that are kept between two turns. Then the resident memory of this process along a
conversation of 64 turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rxt_dist.config.load import load_model  # noqa: E402
from rxt_dist.data.interactions import ANSWER_ID  # noqa: E402
from rxt_dist.inference.generate import Row, answer, write  # noqa: E402
from rxt_dist.inference.sampling import Sampling  # noqa: E402
from rxt_dist.model.init import initialise  # noqa: E402
from rxt_dist.model.memory import initial_memory  # noqa: E402
from rxt_dist.model.reactive import ReactiveTransformer  # noqa: E402

TURNS = (1, 8, 64)
BOS, QUERY, EOS = 2, 5, 3


def network_of(model: str) -> ReactiveTransformer:
    """A network that never ends an answer by itself, and reads a history of any length."""
    network = ReactiveTransformer(load_model(ROOT / f"configs/model/{model}.yaml", ["seq_len=65536"]))
    initialise(network, 0)
    assert network.lm_head is not None
    with torch.no_grad():
        network.lm_head.output.bias[:11] = -1e9
    return network.eval()


def timed(
    network: ReactiveTransformer, memory: torch.Tensor | None, prompt: Sequence[int], tokens: int
) -> tuple[dict[str, float], list[int]]:
    """Times of one answer, and the ids of the interaction."""
    row = Row(prompt, ANSWER_ID, Sampling(max_tokens=tokens, suppress=False), torch.Generator(), frozenset())
    began = time.perf_counter()
    stamps = [time.perf_counter() for _ in answer(network, memory, [row])]
    found = {
        # The first is the mode, which the prompt phase gives; the next is the first that the model says.
        "first_token_s": stamps[1] - began,
        "token_s": (stamps[-1] - stamps[1]) / (len(stamps) - 2),
        "answer_s": stamps[-1] - began,
    }
    if memory is not None:
        began = time.perf_counter()
        write(network, memory, [[*row.written, EOS]])
        found["write_s"] = time.perf_counter() - began
    return found, [*row.written, EOS]


def prepared(network: ReactiveTransformer, turns: int, query: list[int], tokens: int) -> tuple[Any, list[int]]:
    """Memory and history before turn number `turns`."""
    memory, history = initial_memory(network.config, 1, torch.Generator().manual_seed(0)), []
    for _ in range(turns - 1):
        _, ids = timed(network, memory, query, tokens)
        memory = write(network, memory, [ids])
        history += ids
    return memory, history


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """By name."""
    return {name: round(statistics.median(one[name] for one in found), 6) for name in found[0]}


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def measure(network: ReactiveTransformer, rounds: int, query: list[int], tokens: int) -> None:
    """Both models at every turn, in rotation."""
    config = network.config
    states = {turn: prepared(network, turn, query, tokens) for turn in TURNS}
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(rounds + 1):
        for turn, (memory, history) in states.items():
            found.setdefault(("rxt", turn), []).append(timed(network, memory, query, tokens)[0])
            found.setdefault(("stateless", turn), []).append(timed(network, None, [*history, *query], tokens)[0])
    kv_heads = config.decoder.self_attention.kv_heads
    per_token = 2 * config.decoder_layers * kv_heads * config.head_dim * 4
    for kind in ("rxt", "stateless"):
        first: dict[str, float] = {}
        for turn in TURNS:
            figures = medians(found[kind, turn][1:])  # the first round warms up
            first = first or figures
            kept = (
                config.layers * config.stm_slots * config.dim * 4 if kind == "rxt" else per_token * len(states[turn][1])
            )
            ratios = {
                f"{name}_of_turn_1": round(figures[name] / first[name], 3)
                for name in ("first_token_s", "token_s", "answer_s")
            }
            print(json.dumps({"model": kind, "turn": turn, **figures, **ratios, "kept_bytes": kept}), flush=True)


def flatness(network: ReactiveTransformer, query: list[int], tokens: int) -> None:
    """Resident memory and time of each turn of one conversation."""
    memory = initial_memory(network.config, 1, torch.Generator().manual_seed(0))
    sizes, times = [], []
    for _ in range(max(TURNS)):
        figures, ids = timed(network, memory, query, tokens)
        memory = write(network, memory, [ids])
        sizes.append(resident())
        times.append(figures["answer_s"])
    grown = {f"after_{turn}_turns_mb": round(sizes[turn - 1] / 1e6, 1) for turn in (1, 8, 16, 32, 64)}
    halves = [statistics.median(times[4:34]), statistics.median(times[34:])]
    print(json.dumps({"conversation": len(sizes), **grown, "second_half_time": round(halves[1] / halves[0], 3)}))


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--query", type=int, default=24, help="tokens of a query")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    arguments = parser.parse_args()
    network = network_of(arguments.model)
    query = [
        BOS,
        QUERY,
        *torch.randint(11, 200, (arguments.query,), generator=torch.Generator().manual_seed(1)).tolist(),
    ]
    measure(network, arguments.rounds, query, arguments.answer)
    flatness(network, query, arguments.answer)


if __name__ == "__main__":
    main()
