"""Our side of text_to_shards.py: one build of the corpus.

    python benchmarks/data/our_text.py gigatoken|tokenizers CORPUS OUT [--workers 1]

`fixed_cpu_s` is what comes before the first unit: looking into the inputs and, with gigatoken, the parity check on some
ten thousand texts. It hardly grows with the corpus, so the rate leaves it out; `whole_mtok_per_cpu_s` does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cost import Cost, cpu_seconds, peak_mb

from data_prep.documents.build import BuildRequest, build_dataset

SEQ_LEN = 8192


def main() -> None:
    """Parse the arguments, build, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("gigatoken", "tokenizers"))
    parser.add_argument("corpus", type=Path, help="folder that corpus.py wrote")
    parser.add_argument("out", type=Path, help="empty folder")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    arguments = parser.parse_args()
    request = BuildRequest(
        inputs=(arguments.corpus / "parquet",),
        out=arguments.out,
        tokenizer=arguments.corpus / "tokenizer.json",
        seq_len=SEQ_LEN,
        workers=arguments.workers,
        backend=arguments.backend,
    )
    at_units: list[float] = []

    def say(line: str) -> None:
        if line.startswith("Building"):
            at_units.append(cpu_seconds())

    with Cost() as cost:
        began = cpu_seconds()
        manifest = build_dataset(request, say).manifest
    assert manifest is not None
    totals, fixed_s = manifest.totals, at_units[0] - began
    result = {
        "tokens": totals.tokens,
        "padding": totals.padding / (totals.tokens + totals.padding),
        "cpu_s": cost.cpu_s,
        "wall_s": cost.wall_s,
        "fixed_cpu_s": fixed_s,
        "peak_mb": peak_mb(),
        "mtok_per_cpu_s": totals.tokens / (cost.cpu_s - fixed_s) / 1e6,
        "whole_mtok_per_cpu_s": totals.tokens / cost.cpu_s / 1e6,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
