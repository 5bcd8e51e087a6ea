"""Packing documents of web-like lengths into rows: time to plan the rows, and to write them.

    python benchmarks/data/packer.py [--windows 8] [--seq-len 8192] [--mean 1000]

One thread, CPU time; medians over windows of 4,096 documents, after one window to warm up. `plan_mtok_s` is the
assignment of documents to rows alone, `pack_mtok_s` all of it, from arrays of ids to finished rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from synthetic import documents_of, web_lengths

from rxt_dist.data.packing import WINDOW_DOCUMENTS, lay_out_rows, pack


def measure(windows: int = 8, seq_len: int = 8192, mean: float = 1000) -> dict[str, float]:
    """The figures that the module describes, and the share of the rows that is padding."""
    plan_s, pack_s, rates = [], [], []
    tokens = rows = 0
    for window in range(windows + 1):
        lengths = web_lengths(WINDOW_DOCUMENTS, window, mean)
        documents = documents_of(lengths, window)
        framed = [length + 2 for length in lengths]
        times = [time.process_time()]
        lay_out_rows(framed, seq_len)
        times.append(time.process_time())
        packed = pack(documents, range(len(documents)), seq_len)
        times.append(time.process_time())
        if window:
            plan_s.append((times[1] - times[0]) / sum(framed))
            pack_s.append((times[2] - times[1]) / sum(framed))
            rates.append((times[2] - times[1]) * 1e3)
            tokens += sum(framed)
            rows += packed.rows
    return {
        "plan_mtok_s": 1e-6 / statistics.median(plan_s),
        "pack_mtok_s": 1e-6 / statistics.median(pack_s),
        "pack_ms_a_window": statistics.median(rates),
        "padding": 1 - tokens / (rows * seq_len),
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="windows of 4,096 documents (default 8)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens a row (default 8192)")
    parser.add_argument("--mean", type=float, default=1000, help="mean length of a document in tokens (default 1000)")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.windows, arguments.seq_len, arguments.mean), indent=2))


if __name__ == "__main__":
    main()
