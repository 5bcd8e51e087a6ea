"""Hand-made logs of runs, whose times are seconds after a fixed moment."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

BEGUN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def at(seconds: float) -> str:
    """A time as lines state it."""
    return (BEGUN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def moment(seconds: float) -> float:
    """The same as seconds since 1970."""
    return BEGUN.timestamp() + seconds


class Log:
    """The folder of a run that is written line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.resolved.yaml").write_text("# hash\nname: a-run\noptimizer: {lr: 0.001}\n")

    def event(self, time: float, kind: str, **fields: Any) -> Log:
        return self.raw("events.jsonl", json.dumps({"time": at(time), "kind": kind, **fields}) + "\n")

    def line(self, time: float, step: int, **fields: Any) -> Log:
        return self.raw("metrics.jsonl", json.dumps({"step": step, "time": at(time), **fields}) + "\n")

    def raw(self, name: str, text: str) -> Log:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)
        return self


def a_run(
    path: Path, lines: int = 60, seed: int = 0, every: int = 10, layers: int = 4, total: int | None = None
) -> Log:
    """A run of so many lines, three lives, a rollback and a skipped update, as a real one would write it."""
    log, random = Log(path), Random(seed)
    step_tokens, step_s = 65_536, 1.5
    total = total or lines * every * step_tokens
    (path / "config.resolved.yaml").write_text(
        f"train: {{total_tokens: {total}}}\noptimizer: {{lr: {1e-3 / (1 + seed)}}}\n"
    )
    text: dict[str, list[str]] = {"metrics.jsonl": [], "events.jsonl": []}

    def event(kind: str, **fields: Any) -> None:
        text["events.jsonl"].append(json.dumps({"time": at(now), "kind": kind, **fields}))

    def line(**fields: Any) -> None:
        text["metrics.jsonl"].append(
            json.dumps({"step": step, "time": at(now), "tokens": step * step_tokens, **fields})
        )

    now, step = 0.0, 0
    for index in range(lines):
        if index in (0, lines // 3, 2 * lines // 3):
            if index:
                now += step_s * every / 2
                event("exit", code=137, reason="rank 1 was killed by signal 9", step=step, life=str(index - lines // 3))
                now += 60
            launched, now = now, now + 5
            event("start", life=str(index), ranks=2, launched=at(launched), attempt=0)
            now += 20
            if index:
                lost = {"lost_steps": every, "lost_s": every * step_s, "lost_until": at(launched - 60)}
                event("resume", step=step, checkpoint=f"step-{step}", seconds=4.0, **lost)
            now += 2
            event("ready", step=step, seconds=now - launched)
        step += every
        now += step_s * every
        share = (index + 1) / lines
        loss = 2 + 8 * math.exp(-6 * share) + random.gauss(0, 0.1)
        line(
            steps=every,
            step_s=step_s,
            data_wait_s=0.2,
            ar_loss=loss if index % 97 != 41 else None,
            mlm_loss=0.8 * loss + 0.3,
            balance_loss=1 + random.random() / 10,
            z_loss=3 + random.random(),
            ar_accuracy=1 - loss / 12,
            grad_norm=random.lognormvariate(0, 0.4),
            skipped=0,
            tokens_per_s=step_tokens / step_s * random.uniform(0.9, 1.0),
            mfu=0.3 * random.uniform(0.9, 1.0),
            expert_load_max=[1 + (layer + 1) * (1 - share) + random.random() / 3 for layer in range(layers)],
            experts_idle=0.1 * (1 - share),
            lr=1e-3 / (1 + seed) * min(1, share * 10) * (1 - 0.9 * share),
            noise=0.2 * share,
            masking=0.15 * share,
        )
        if index % max(1, lines // 12) == 0:
            event("save", step=step, path=f"step-{step}", bytes=10**9, seconds=random.uniform(6, 9), stall_s=0.4)
            now += 0.4
        if index % max(1, lines // 8) == max(1, lines // 8) - 1:
            now += 8
            figures = {}
            for source in ("en", "pl"):
                for view, less in (("true", 0.0), ("zero", 0.3), ("foreign", 0.35)):
                    figures[f"eval/{source}/{view}/ar_loss"] = loss + 5 * less
                    figures[f"eval/{source}/{view}/ar_accuracy"] = max(0.0, 0.9 * share - less * share)
                figures[f"eval/{source}/mlm_loss"] = 0.8 * loss
                figures[f"eval/{source}/mlm_accuracy"] = 0.5 * share
            line(**figures)
            event("eval", step=step, sources=2, seconds=8.0)
        if index == lines // 2:
            event("skip", step=step, reason="gradient that is not finite", in_a_row=1)
            event("rollback", step=step, to_step=step - every, seconds=3.0, lost_s=every * step_s, reason="<b>loss</b>")
            now += 3 + every * step_s
    event("finish", step=step, tokens=step * step_tokens)
    event("exit", code=0, reason="finished", step=step, life=str(2 * lines // 3))
    for name, entries in text.items():
        log.raw(name, "\n".join(entries) + "\n")
    return log
