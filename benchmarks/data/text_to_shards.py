"""Text to packed, checksummed shards: Mtok per CPU second, beside what peers need for flat token files.

    python benchmarks/data/text_to_shards.py [--megabytes 64] [--rounds 3] [--json]

All sides read the same text (corpus.py) with the same tokenizer in one process and one thread; what is slow reads half
of it. CPU time is that of the work, user and system, of all processes, without starting the interpreter and imports.
Ours packs best-fit and writes checksums; the peers do neither (peers_text.py). Sides alternate in fresh processes,
medians are compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from corpus import make_corpus
from peers import measure, scratch
from report import Line, alternate, ratio_line, table

SLOW_PEERS = ("datatrove", "datasets", "datasets-tuned", "megatron", "megatron-fast")
FAST_PEERS = ("megatron-fastokens",)
RATE = "mtok_per_cpu_s"


def run_once(side: str, script: str, first: str, corpus: Path, *more: object) -> dict[str, Any]:
    """One measurement into an empty folder, which is deleted."""
    out = Path(tempfile.mkdtemp(dir=scratch("out")))
    try:
        return measure(side, script, first, corpus, out, *more)
    finally:
        shutil.rmtree(out)


def run(megabytes: int, rounds: int) -> tuple[dict[str, dict[str, Any]], list[Line]]:
    """Results by side, and the lines for the table."""
    corpus = make_corpus(megabytes)
    sides = {
        "ours gigatoken": partial(run_once, "ours", "our_text.py", "gigatoken", corpus),
        "ours tokenizers": partial(run_once, "ours", "our_text.py", "tokenizers", corpus / "half"),
        "ours 2 workers": partial(run_once, "ours", "our_text.py", "gigatoken", corpus, "--workers", 2),
    }
    for peer in (*SLOW_PEERS, *FAST_PEERS):
        text = corpus / "half" if peer in SLOW_PEERS else corpus
        sides[peer] = partial(run_once, "peers", "peers_text.py", peer, text)
    results = alternate(sides, rounds)
    what = "text to shards, Mtok per CPU s"
    goals = {"datatrove": ">= 15", "datasets": ">= 15", "megatron-fast": ">= 2.5"}
    lines = [
        ratio_line(f"{what}, gigatoken", results, "ours gigatoken", (peer,), RATE, goals.get(peer, ""))
        for peer in (*SLOW_PEERS, *FAST_PEERS)
    ]
    plain, tuned = ("datatrove", "datasets", "megatron"), ("datasets-tuned", "megatron-fast")
    lines.append(ratio_line(f"{what}, tokenizers", results, "ours tokenizers", plain, RATE, ">= 1.2"))
    lines.append(ratio_line(f"{what}, tokenizers", results, "ours tokenizers", tuned, RATE, ""))
    pair = results["ours 2 workers"]
    wall_rate = pair["tokens"] / pair["wall_s"] / 1e6
    lines.append(Line("all of it with 2 workers, start included, Mtok per second", f"{wall_rate:.1f}", "", "", ""))
    one = results["ours gigatoken"]
    whole_rate = f"{one['whole_mtok_per_cpu_s']:.1f}"
    lines.append(Line("all of it with 1 worker, start included, Mtok per CPU s", whole_rate, "", "", ""))
    lines.append(Line("a build's start (inputs, parity check), CPU s", f"{one['fixed_cpu_s']:.1f}", "", "", ""))
    lines.append(Line("peak memory of a worker, MB", f"{pair['peak_mb']:.0f}", "", "", "<= 512"))
    return results, lines


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="text in MB (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    arguments = parser.parse_args()
    results, lines = run(arguments.megabytes, arguments.rounds)
    print(json.dumps(results) if arguments.json else table(lines))


if __name__ == "__main__":
    main()
