"""Packing documents of web-like lengths into rows of 8,192: speed and padding, beside OLMo-core's and TRL's packers.

    python benchmarks/data/packing.py [--rounds 3] [--json]

All get the same lengths (log-normal, 1,000 tokens on average) in one thread. OLMo-core's packer only assigns documents
to rows, and is compared with that part of ours; TRL's also writes the rows. Ours and TRL's see 4,096 documents at a
time, OLMo-core's all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import measure, scratch
from report import Line, alternate, table
from synthetic import web_lengths

from rxt_dist.data.packing import WINDOW_DOCUMENTS

WINDOWS = 8


def run(rounds: int) -> tuple[dict[str, dict[str, Any]], list[Line]]:
    """Results by side, and the lines for the table."""
    with tempfile.TemporaryDirectory(dir=scratch("out")) as folder:
        file = Path(folder) / "lengths.npy"
        lengths = [length + 2 for window in range(1, WINDOWS + 1) for length in web_lengths(WINDOW_DOCUMENTS, window)]
        np.save(file, np.array(lengths))
        sides = {"ours": partial(measure, "ours", "packer.py", "--windows", WINDOWS)}
        sides |= {peer: partial(measure, "peers", "peers_packing.py", peer, file) for peer in ("olmo", "trl")}
        results = alternate(sides, rounds)
    ours, olmo, trl = results["ours"], results["olmo"], results["trl"]
    lines = [
        _line("assigning documents to rows", ours["plan_mtok_s"], olmo, "olmo", ">= 5"),
        _line("packing, rows written", ours["pack_mtok_s"], trl, "trl", ""),
        Line("padding at 8,192", f"{ours['padding']:.2%}", f"{olmo['padding']:.2%} (olmo)", "", "<= 0.2 %"),
    ]
    return results, lines


def _line(figure: str, ours: float, theirs: dict[str, Any], name: str, goal: str) -> Line:
    rate = theirs["mtok_per_cpu_s"]
    return Line(f"{figure}, Mtok per CPU s", f"{ours:,.0f}", f"{rate:,.0f} ({name})", f"{ours / rate:.1f}", goal)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    arguments = parser.parse_args()
    results, lines = run(arguments.rounds)
    print(json.dumps(results) if arguments.json else table(lines))


if __name__ == "__main__":
    main()
