"""Shuffled, mixed rows to int64 batches: Mtok per CPU second, beside the loaders of other libraries.

    python benchmarks/data/random_rows.py [--seq-len 8192 --seq-len 1024] [--rounds 3] [--json]

Three sources, 2**27 tokens in all, mixed 5 : 3 : 2, batches of 8 rows, files in the page cache, no worker processes;
CPU time of the whole process. Sides alternate in fresh processes, medians are compared. Most libraries give tokens
alone: they are compared with ours without the bounds of documents (each row is still checked against its checksum).
Two can say where documents begin, and Megatron always gives labels, mask and positions: they are also compared with
our whole batch, which has the bounds.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from peers import measure, scratch
from report import Line, alternate, table

TOKEN_PEERS = ("datatrove", "datasets", "datasets-torch", "litdata", "mosaicml", "olmo", "megatron")
DOCUMENT_PEERS = ("datatrove-documents", "olmo-documents", "megatron")
RATE = "mtok_per_cpu_s"
BATCHES = {8192: 240, 1024: 600}  # in each of five blocks; the files hold no more at 8,192


def run(seq_len: int, rounds: int) -> tuple[dict[str, dict[str, Any]], list[Line]]:
    """Results by side, and the lines for the table, for one row length."""
    root = scratch("rows")
    more = ("--seq-len", seq_len, "--batches", BATCHES[seq_len])
    sides = {"ours": partial(measure, "ours", "our_rows.py", root, *more)}
    for peer in dict.fromkeys((*TOKEN_PEERS, *DOCUMENT_PEERS)):
        sides[peer] = partial(measure, "peers", "peers_rows.py", peer, root, *more)
    results = alternate(sides, rounds)
    what = f"random rows to int64, 8 x {seq_len:,}, Mtok per CPU s"
    ours = results["ours"]
    ranked = sorted(TOKEN_PEERS, key=lambda peer: -results[peer][RATE])
    goals = {ranked[0]: ">= 1.5", "megatron": ">= 10"}
    lines = [
        _line(f"{what}: tokens alone", ours[f"tokens_{RATE}"], peer, results, goals.get(peer, "")) for peer in ranked
    ]
    lines += [_line(f"{what}: with documents", ours[f"documents_{RATE}"], peer, results, "") for peer in DOCUMENT_PEERS]
    cost = f"{ours['consumer_us']:.0f} (all threads {ours['process_us']:.0f})"
    goal = "<= 100" if seq_len == 8192 else ""
    lines.append(Line(f"loader in training, 8 x {seq_len:,}, CPU us a batch", cost, "", "", goal))
    return results, lines


def _line(figure: str, ours: float, peer: str, results: dict[str, dict[str, Any]], goal: str) -> Line:
    rate = results[peer][RATE]
    return Line(figure, f"{ours:,.0f}", f"{rate:,.0f} ({peer})", f"{ours / rate:.2f}", goal)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, choices=BATCHES, action="append", help="may be repeated; default: both")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    arguments = parser.parse_args()
    measured = {seq_len: run(seq_len, arguments.rounds) for seq_len in arguments.seq_len or BATCHES}
    if arguments.json:
        print(json.dumps({seq_len: results for seq_len, (results, _) in measured.items()}))
    else:
        print(table([line for _, lines in measured.values() for line in lines]))


if __name__ == "__main__":
    main()
