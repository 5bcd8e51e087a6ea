"""All data benchmarks with a peer or a goal, as one markdown table.

    python benchmarks/data/run_all.py [--rounds 3] [--only packing] [--json results.json]

About ten minutes on two cores with three rounds; the first run also installs the peers and writes the corpus and all
files that are read (five minutes, 6 GB in benchmarks/.peers-venv and benchmarks/.scratch).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import packing
import random_rows
import text_to_shards
from peers import measure, scratch
from report import Line, alternate, table

MEGABYTES = 64
FIRST_BATCH_PEERS = ("datatrove", "datasets", "olmo", "megatron")
Result = tuple[dict[str, dict[str, Any]], list[Line]]


def run_first_batch(rounds: int) -> Result:
    """Seconds from opening 745 small shards to the first batch."""
    root = scratch("first")
    sides = {"ours": partial(measure, "ours", "first_batch.py")}
    sides |= {peer: partial(measure, "peers", "peers_first_batch.py", peer, root) for peer in FIRST_BATCH_PEERS}
    results = alternate(sides, rounds)
    ours = results["ours"]["first_batch_s"]
    lines = []
    for peer in FIRST_BATCH_PEERS:
        theirs = results[peer]["first_batch_s"]
        cells = (f"{ours * 1e3:.0f}", f"{theirs * 1e3:.0f} ({peer})", f"{theirs / ours:.2f}")
        lines.append(Line("first batch from 745 shards, ms", *cells, "<= 500 ms"))
    return results, lines


PARTS: dict[str, Callable[[int], Result]] = {
    "text_to_shards": partial(text_to_shards.run, MEGABYTES),
    "random_rows 8192": partial(random_rows.run, 8192),
    "random_rows 1024": partial(random_rows.run, 1024),
    "first_batch": run_first_batch,
    "packing": packing.run,
}


def main() -> None:
    """Parse the arguments, measure everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated; default: all parts")
    parser.add_argument("--json", type=Path, help="file for the medians of all sides")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version()}
    lines = []
    for part in arguments.only or PARTS:
        began = time.monotonic()
        results[part], of_part = PARTS[part](arguments.rounds)
        lines += of_part
        print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
