"""What is compared: the data, the two models of equal size, and the runs of every arm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.count import attention_parameters, count_system

TRAINED, HELD_OUT = (1, 2, 3, 4, 6, 8), (12, 16)
DISTANCES = TRAINED + HELD_OUT
_FACTS, _FILLERS = 3, 2
_LONGEST_TRAINED = TRAINED[-1] + 1 + _FILLERS
# Tokens of the longest turn, of a row of joint pre-training, of a row of trained histories, and of the longest history.
TURN, ROW, HISTORY_ROW, LONGEST_HISTORY = 32, 128, 256, 1024
_DIALOGUES = 32  # a step
_MIX = {f"recall-d{distance}-en": 2 if distance > 4 else 1 for distance in TRAINED}


def source(distance: int) -> str:
    """Dialogues each of which asks for something that was told so many turns before."""
    return f"recall-d{distance}-en"


@dataclass(frozen=True)
class Arm:
    """title: what tables call it. memory: whether it is a Reactive Transformer."""

    title: str
    memory: bool


ARMS = {
    "curriculum": Arm("RxT, distance curriculum", True),
    "mixture": Arm("RxT, all distances at once", True),
    "depth-1": Arm("RxT, distance curriculum, depth 1", True),
    "history": Arm("stateless, whole history", False),
    "turn": Arm("stateless, current turn", False),
}
_EVERYTHING = [{"weights": _MIX}]


def curriculum() -> list[dict[str, Any]]:
    """Phases: one fact that is asked for at once, two turns, two and four turns, all. A phase that others follow has
    whole blocks of 4,096 dialogues, 128 steps."""
    block = 128 * _DIALOGUES * _LONGEST_TRAINED * TURN
    return [
        {"tokens": 2 * block, "weights": {"near-d1-en": 1}},
        {"tokens": 2 * block, "weights": {source(2): 1}},
        {"tokens": 2 * block, "weights": {source(2): 1, source(4): 1}},
        *_EVERYTHING,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def data_commands(data: Path, steps: int, held_out: int, vocabulary: int) -> list[list[str]]:
    """Arguments of `rxt-dist data`, in order. Texts and single interactions are of other dialogues than those that
    tell and ask: whatever is held out of these was read by nobody."""
    small = ["--languages", "en", "--variety", "small", "--held-out-values", "0"]
    reading = ["--distances", _listed(TRAINED), "--fillers", str(_FILLERS), "--facts", str(_FACTS)]
    # So many that most are read once: of a quarter as many, those trained on were recalled by 8 points better.
    count = max(100, 10 * steps)
    tokenizer = ["--tokenizer", str(data / "texts/tokenizer.json")]
    # Chosen by hash, so that their number is about this; a quarter more, so that it is enough.
    share = 1.25 * held_out / (count + held_out)
    return [
        ["recall", str(data / "talks/near"), *small, "--name", "near", "--distances", "1", "--held-out-distances", "",
         "--facts", "1", "--fillers", "0", "--count", str(count // 2), "--held-out-count", "1"],
        ["recall", str(data / "talks/far"), *small, *reading, "--held-out-distances", _listed(HELD_OUT),
         "--count", str(count + held_out), "--held-out-count", str(held_out)],
        ["recall", str(data / "reading"), *small, *reading, "--held-out-distances", "", "--count", str(count // 8),
         "--held-out-count", "1", "--seed", "1"],
        ["build", str(data / "reading"), "--out", str(data / "texts"), "--seq-len", str(ROW), "--vocab-size",
         str(vocabulary), "--workers", "1"],
        ["interactions", str(data / "reading"), "--split-dialogues", "--out", str(data / "single"), *tokenizer,
         "--seq-len", str(ROW), "--workers", "1"],
        ["interactions", str(data / "talks"), "--kind", "dialogues", "--out", str(data / "dialogues"), *tokenizer,
         "--seq-len", str(TURN), "--eval-fraction", f"{share:.3f}", "--workers", "1"],
    ]  # fmt: skip


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def stateless(model: ModelConfig) -> ModelConfig:
    """The decoder of a system without its memory, its experts so wide that both have the same number of parameters."""
    wanted, moe = count_system(model).total, model.decoder.moe

    def of(hidden: int) -> ModelConfig:
        decoder = model.decoder.model_copy(update={"moe": moe.model_copy(update={"hidden": hidden})})
        without = {"name": "recall-stateless", "encoder": None, "memory_attention": None, "seq_len": LONGEST_HISTORY}
        return model.model_copy(update=without | {"decoder": decoder})

    widths = range(moe.hidden, 8 * moe.hidden)
    return min(map(of, widths), key=lambda one: abs(parameters(one) - wanted))


def parameters(model: ModelConfig) -> int:
    """Parameters that a system computes with: without a memory a decoder passes its cross-attention over."""
    total = count_system(model).total
    if model.memory_attention:
        return total
    cross = attention_parameters(model, model.decoder.cross_attention, model.decoder.attention_bias)
    return total - model.layers * (cross + 2 * model.dim)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that decides a run besides its arm: folder, steps of memory-aware training, and the memory's model."""

    out: Path
    steps: int
    model: ModelConfig

    def runs(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """The runs of an arm in order, as run files; those before the last are shared by the arms with a memory."""
        if not ARMS[arm].memory:
            return [self._stateless(arm, seed)]
        talk = ["embedding", "encoder", "mlm_head", "decoder", "lm_head"]
        joint, sft, memory = (f"seed-{seed}-{stage}" for stage in ("joint", "sft", "memory"))
        noise = {"memory_noise": {"start": 0.2, "end": 0.2}, "memory_masking": {"start": 0.1, "end": 0.1}}
        turns = {"kind": "smat", "turns": _LONGEST_TRAINED, "train_mode": True, "recompute_turns": False}
        dialogues = {"path": self._data("dialogues"), "seq_len": TURN}
        return [
            self._run(joint, seed, {"kind": "joint"} | noise, {"path": self._data("texts")}, self.steps // 24, ROW),
            self._run(sft, seed, {"kind": "sft", "train_mode": True} | noise, {"path": self._data("single")},
                      self.steps // 12, ROW, start=self._from(joint, talk)),
            self._run(memory, seed, {"kind": "memory", "turns": 6}, dialogues | {"mixture": _EVERYTHING},
                      self.steps // 20, 6 * TURN, lr=2e-3, start=self._from(sft, ["embedding", "encoder"])),
            self._run(f"seed-{seed}-{arm}", seed, turns | ({"depth": 1} if arm == "depth-1" else {}),
                      dialogues | {"mixture": _EVERYTHING if arm == "mixture" else curriculum()},
                      self.steps, _LONGEST_TRAINED * TURN,
                      start=self._from(memory, ["embedding", "encoder", "memory_attention"])
                      | {"also": [self._from(sft, ["decoder", "lm_head"])]}),
        ]  # fmt: skip

    def _stateless(self, arm: str, seed: int) -> dict[str, Any]:
        stage = {"kind": "decoder-sft", "memory": "off", "train_embedding": True, "train_mode": True}
        whole = arm == "history"
        data = {"path": self._data("histories"), "mixture": _EVERYTHING} if whole else {"path": self._data("single")}
        row = HISTORY_ROW if whole else ROW
        steps = 2 * self.steps // 3 if whole else self.steps // 6
        # As many tokens a step in both: those of 32 dialogues, about.
        rows = _DIALOGUES * ROW // row
        model = stateless(self.model)
        return self._run(f"seed-{seed}-{arm}", seed, stage, data, steps, row, rows=rows, lr=3e-3, model=model)

    def _data(self, name: str) -> str:
        return str(self.out / "data" / name)

    def _from(self, run: str, parts: list[str]) -> dict[str, Any]:
        return {"run": str(self.out / "runs" / run), "parts": parts}

    def _run(
        self,
        name: str,
        seed: int,
        stage: dict[str, Any],
        data: dict[str, Any],
        steps: int,
        row: int,
        rows: int = _DIALOGUES,
        lr: float = 4e-3,
        start: dict[str, Any] | None = None,
        model: ModelConfig | None = None,
    ) -> dict[str, Any]:
        """row: tokens of a row, or of the turns that are read of a dialogue."""
        step = rows * row
        total = max(2, steps) * step
        return {
            "name": name,
            "output": str(self.out / "runs"),
            "seed": seed,
            "model": (model or self.model).model_dump(mode="json"),
            "data": {"max_epochs": 1e6} | data,
            "stage": stage,
            "train": {
                "total_tokens": total, "global_batch_tokens": step, "micro_batch_rows": rows, "precision": "float32",
            },
            "optimizer": {"lr": lr},
            "schedule": {"kind": "wsd", "warmup_tokens": total // 40, "decay_tokens": total // 4},
            "parallel": {"engine": "plain", "zero": 0},
            "checkpoint": {"every_tokens": max(1, steps // 4) * step, "keep": 2},
            "eval": {"rows_per_source": 8},
            "log": {"wandb": "disabled"},
        } | ({"start": start} if start else {})  # fmt: skip
