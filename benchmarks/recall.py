"""What a memory of fixed size recalls, beside the same decoder with its whole history or none.

    python benchmarks/recall.py OUT [--seeds 3] [--arms curriculum mixture depth-1 history turn] [--jobs 2]

Makes dialogues that tell facts and ask for them 1 to 16 turns later (those of 12 and 16 are not trained on), trains
each arm with each seed through `rxt-dist`, and lets every model answer held-out dialogues by itself. All models have
the same number of parameters; docs/memory.md describes the arms. The same command goes on where it was interrupted. In
OUT: results/SEED/ARM.json, and from all that are there results.json, recall.md and recall.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from recall_parts.arms import ARMS, DISTANCES, HISTORY_ROW, ROW, Plan, data_commands, parameters, source
from recall_parts.figures import write_report

from rxt_dist.config.load import load_model
from rxt_dist.config.model import ModelConfig
from rxt_dist.files import write_atomic, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
MODEL, VOCABULARY = ROOT / "configs/model/demo-talk.yaml", 1024
PRODUCT = ("-m", "rxt_dist")


class Benchmark:
    """Trains and evaluates arms; several seeds may be at work at once.

    Args:
        out: a folder of this benchmark, or a new one.
        steps: of memory-aware training, which the other runs are shorter than.
        held_out: dialogues of each distance.
    """

    def __init__(self, out: Path, steps: int, held_out: int) -> None:
        self.out, self.held_out = out, held_out
        self.plan = Plan(out, steps, load_model(MODEL, [f"vocab_size={VOCABULARY}", f"seq_len={ROW}"]))
        self._cpu_lock = threading.Lock()
        settings = {"steps": steps, "held_out": held_out}
        file = out / "settings.json"
        if file.is_file() and json.loads(file.read_text()) != settings:
            sys.exit(f"{out} is of other settings ({file.read_text().strip()}): name another folder.")
        write_json_atomic(file, settings)

    def make_data(self) -> None:
        """Dialogues, tokenizer, and rows for all stages; what is there is not made again."""
        data = self.out / "data"
        for arguments in data_commands(data, self.plan.steps, self.held_out, VOCABULARY):
            self.call(f"data-{arguments[0]}", *PRODUCT, "data", *arguments)
        if not (data / "histories/dataset.json").is_file():
            program = ROOT / "benchmarks/recall_parts/histories.py"
            self.call("data-histories", program, data / "dialogues", data / "histories", HISTORY_ROW)

    def train(self, run: dict[str, Any]) -> None:
        """Train, or go on training, unless it is finished."""
        name, folder = run["name"], self.out / "runs" / run["name"]
        if (folder / "finished.json").is_file():
            return
        file = self.out / "configs" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, yaml.safe_dump(run, sort_keys=False))
        self.call(name, *PRODUCT, "train", file)

    def measure(self, arm: str, seed: int) -> None:
        """Train an arm and write its figures, unless they are there."""
        file = self.out / "results" / f"seed-{seed}" / f"{arm}.json"
        if file.is_file():
            return
        runs = self.plan.runs(arm, seed)
        for run in runs:
            self.train(run)
        print(f"seed {seed}, {arm}: evaluating", flush=True)
        cost = self.cpu_seconds()
        model = ModelConfig.model_validate(runs[-1]["model"])
        result = {
            "arm": arm,
            "seed": seed,
            "parameters": parameters(model),
            "state_bytes": state_bytes(model),
            "runs": [
                {
                    "name": run["name"],
                    "steps": run["train"]["total_tokens"] // run["train"]["global_batch_tokens"],
                    "cpu_s": round(cost[run["name"]], 1),
                }
                for run in runs
            ],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, result | self.evaluate(arm, runs[-1]["name"]))

    def evaluate(self, arm: str, run: str) -> dict[str, Any]:
        """Recall by source, distance and memory, and perplexity by source, turn and memory."""
        place, data = self.out / "runs" / run, self.out / "data/dialogues"
        rows = "--rows", self.held_out
        sources = [argument for distance in DISTANCES for argument in ("--source", source(distance))]
        name = f"{run}-evaluation"
        if not ARMS[arm].memory:
            program = ROOT / "benchmarks/recall_parts/stateless.py"
            whole = ["--history"] if arm == "history" else []
            return json.loads(self.call(name, program, place, data, *rows, *sources, *whole))
        recall = self.call(name, *PRODUCT, "evaluate", place, data, *rows, "--recall", *sources, "--json")
        turns = self.call(name, *PRODUCT, "evaluate", place, data, *rows, "--json")
        return {"recall": json.loads(recall)["recall"], "turns": json.loads(turns)}

    def call(self, name: str, *arguments: object) -> str:
        """What a Python program says on standard output; its processor time is written down under a name.

        Raises:
            SystemExit: it failed; what it said is told.
        """
        log, said = (self.out / "logs" / f"{name}.{end}" for end in ("log", "out"))
        log.parent.mkdir(exist_ok=True)
        print(f"$ {' '.join(map(str, arguments))}", flush=True)
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        with open(said, "wb") as output, open(log, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=output, stderr=errors, env=os.environ | own
            )
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.spent(name, used.ru_utime + used.ru_stime)
        if process.returncode:
            sys.exit(
                f"{name} ended with code {process.returncode}:\n{said.read_text()[-2000:]}{log.read_text()[-2000:]}"
            )
        return said.read_text()

    def spent(self, name: str, cpu_seconds: float) -> None:
        """Write down what a program has cost."""
        with self._cpu_lock, open(self.out / "cpu.jsonl", "a") as file:
            file.write(json.dumps({"name": name, "cpu_s": cpu_seconds}) + "\n")

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time by name, of all lives of a program that were seen to end."""
        found: dict[str, float] = {}
        for line in (self.out / "cpu.jsonl").read_text().splitlines():
            of = json.loads(line)
            found[of["name"]] = found.get(of["name"], 0.0) + of["cpu_s"]
        return found


def state_bytes(model: ModelConfig) -> dict[str, int]:
    """What is kept between two turns, in float32: `fixed`, and for each token of the history."""
    if model.memory_attention:
        return {"fixed": 4 * model.layers * model.stm_slots * model.dim, "per_token": 0}
    kv_heads = model.decoder.self_attention.kv_heads
    return {"fixed": 0, "per_token": 4 * 2 * model.decoder_layers * kv_heads * model.head_dim}


def main() -> None:
    """Parse the arguments, train and evaluate, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data, runs and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at work at once, of a core each")
    parser.add_argument("--steps", type=int, default=1200, help="of memory-aware training")
    parser.add_argument("--held-out", type=int, default=100, help="dialogues of each distance")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(out, arguments.steps, arguments.held_out)
    benchmark.make_data()

    def of_seed(seed: int) -> None:
        for arm in arguments.arms:
            benchmark.measure(arm, seed)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(of_seed, range(arguments.seeds)))
    print(write_report(out))


if __name__ == "__main__":
    main()
