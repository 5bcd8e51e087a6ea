"""A tiny real run for tests: sample texts, tokenizer, shards, a run file, and the commands that train it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from warm_start import WarmProcess

from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.interactions.build import InteractionRequest, Kind, build_interactions
from data_prep.interactions.synthetic import write_interactions
from data_prep.synthetic import write_sample
from rxt_dist.files import write_atomic
from rxt_dist.train.events import read_lines

MODEL = Path(__file__).parents[1] / "configs/model/demo.yaml"
SEQ_LEN = 64
STEP_TOKENS = 8 * SEQ_LEN
SHARED_BY_TWO = "train.micro_batch_rows=4"


def build_shards(folder: Path, seq_len: int = SEQ_LEN) -> Path:
    """A small bilingual dataset."""
    write_sample(folder / "corpus", text_bytes=120_000)
    build_dataset(
        BuildRequest(
            (folder / "corpus",), folder / "shards", seq_len=seq_len, vocab_size=600, eval_fraction=0.1, workers=1
        )
    )
    return folder / "shards"


def build_interaction_shards(
    folder: Path, tokenizer: Path, kind: Kind = "single", seq_len: int = SEQ_LEN, text_bytes: int = 120_000
) -> Path:
    """A small bilingual dataset of single interactions or dialogues, with the tokenizer of `build_shards`."""
    write_interactions(folder / "chats", text_bytes=text_bytes)
    inputs = (folder / "chats" / kind,)
    request = InteractionRequest(
        inputs, folder / "shards", tokenizer, seq_len=seq_len, kind=kind, eval_fraction=0.1, workers=1
    )
    build_interactions(request)
    return folder / "shards"


@dataclass(frozen=True)
class TinyRun:
    """A run file in `folder`, on shards made by `build_shards`."""

    folder: Path
    shards: Path
    steps: int = 30

    @property
    def directory(self) -> Path:
        return self.folder / "runs/tiny"

    @property
    def file(self) -> Path:
        path = self.folder / "run.yaml"
        # Several ranks may ask for it at the same moment.
        write_atomic(path, yaml.safe_dump(self.content()))
        return path

    def content(self) -> dict[str, Any]:
        """The run as a mapping; one plain process unless overridden."""
        model = yaml.safe_load(MODEL.read_text())
        model |= {"vocab_size": 600, "dim": 32, "layers": 1, "seq_len": SEQ_LEN, "stm_slots": 8}
        model["decoder"] |= {"dense_hidden": 32}
        model["decoder"]["moe"] |= {"experts": 8, "hidden": 16, "shared_hidden": 16}
        model["encoder"] |= {"hidden": 32}
        model["memory_attention"] |= {"groups": 1}
        return {
            "name": "tiny",
            "output": str(self.folder / "runs"),
            "seed": 1,
            "model": model,
            "data": {"path": str(self.shards), "max_epochs": 100},
            "train": {
                "total_tokens": self.steps * STEP_TOKENS,
                "global_batch_tokens": STEP_TOKENS,
                # All at once: most of a tiny step is the same for four rows as for eight.
                "micro_batch_rows": 8,
                "precision": "float32",
            },
            "optimizer": {"lr": 1e-3},
            "parallel": {"engine": "plain", "zero": 0},
            "checkpoint": {"every_tokens": 5 * STEP_TOKENS, "keep": 2},
            "eval": {"rows_per_source": 4},
            "log": {"every_steps": 1, "wandb": "disabled"},
        }

    def train_command(self, *overrides: str) -> list[str]:
        """One process."""
        return [sys.executable, "-m", "rxt_dist", "train", str(self.file), *overrides]

    def launch_command(self, *arguments: str) -> list[str]:
        """Two DeepSpeed ranks with ZeRO-3 and expert parallelism."""
        overrides = ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.expert_parallel=2", SHARED_BY_TWO]
        launch = [sys.executable, "-m", "rxt_dist", "launch", "local", str(self.file), "--ranks", "2"]
        return [*launch, *arguments, *overrides]

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """All whole lines of a file of the run directory."""
        return read_lines(self.directory / name)

    def curve(self) -> list[tuple[float, ...]]:
        """What training gave, step by step, without anything that depends on time."""
        fields = ("step", "ar_loss", "mlm_loss", "balance_loss", "z_loss", "grad_norm", "lr", "ar_accuracy")
        return [tuple(line[field] for field in fields) for line in self.lines() if "ar_loss" in line]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.lines("events.jsonl") if event["kind"] == kind]


# A process of its own, or one that begins warm.
Running = subprocess.Popen[str] | WarmProcess
_TRAIN = [sys.executable, "-m", "rxt_dist", "train"]


def start(command: list[str], cold: bool = False) -> Running:
    """Start a command with one thread a process, its output in one pipe; a single rank warm, unless it must not be."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if command[: len(_TRAIN)] == _TRAIN and not cold:
        return WarmProcess(command[len(_TRAIN) - 1 :], environment)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(command: list[str], expected: int = 0, deadline: float = 120.0) -> str:
    """Run a command to its end; its output. Fails on another exit code."""
    process = start(command)
    try:
        output = process.communicate(timeout=deadline)[0]
    finally:
        process.kill()
    assert process.returncode == expected, f"exit code {process.returncode} instead of {expected}\n{output}"
    return output
