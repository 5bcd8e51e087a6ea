"""A soak: one small run through many random faults until it finishes, beside the same run undisturbed.

    python benchmarks/faults/soak.py [--faults 200] [--seed 1] [--ranks 1] [--out FILE.json]

With one rank the run is one process of plain torch, started warm; with two it is `launch local` with ZeRO-3 and expert
parallelism. At its end weights, moments and curve must be those of the undisturbed run, bit by bit. The table says per
kind of fault how often it struck, how many steps were done again, and how long it took until there was a new one; and
where the wall time of all its lives went (goodput).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from faults.kinds import STOPPED_ONLY, TORN, Kind, drawn  # noqa: E402
from training_run import Running, TinyRun, build_shards, start  # noqa: E402

from rxt_dist.checkpoint.store import CHECKSUM, CheckpointStore  # noqa: E402
from rxt_dist.report.goodput import goodput  # noqa: E402

_POLL_SECONDS = 0.005
_PATIENCE_SECONDS = 120.0
# A frozen rank is to be found out soon; steps of these runs take hundredths of a second.
_DEADLINES = "health.deadlines={step: 2, data: 5, save: 20, load: 30, evaluate: 30, set_up: 60}"


@dataclass
class Seen:
    """What one kind of fault cost: steps done again, and seconds until there was a new step."""

    times: int = 0
    again: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=lambda: defaultdict(int))


class Live:
    """A life of the run that goes on. See `faults.kinds.Life`."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self.directory = soak.tiny.directory
        self.process: Running = start(soak.command)

    def ranks(self) -> list[int]:
        if self._soak.number == 1:
            return [self.process.pid]
        self.wait(lambda: len(self._children()) == self._soak.number)
        return self._children()

    def _children(self) -> list[int]:
        try:
            return [child.pid for child in psutil.Process(self.process.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def begin_another(self) -> int:
        return start(self._soak.command).wait(_PATIENCE_SECONDS)

    def wait(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            assert time.monotonic() < end, f"no progress in {_PATIENCE_SECONDS:g} s"
            time.sleep(_POLL_SECONDS)
        return True

    def end(self, allowed: Collection[int], patience: float = _PATIENCE_SECONDS) -> int:
        """Wait for it; its exit code, which is one of these."""
        output, code = self.process.communicate(timeout=patience)[0], self.process.returncode
        assert code is not None
        assert code in allowed, f"exit code {code} is none of {allowed}:\n{output[-3000:]}"
        return code


class Soak:
    """One run and what is done to it."""

    def __init__(self, folder: Path, shards: Path, steps: int, number: int, seed: int) -> None:
        self.tiny, self.number = TinyRun(folder, shards, steps), number
        self.chance = random.Random(seed)
        self.seen: dict[str, Seen] = defaultdict(Seen)
        own = [_DEADLINES, "checkpoint.keep=3"]
        ranks = ["parallel.engine=deepspeed", "parallel.zero=3", f"parallel.expert_parallel={number}"]
        tiny = self.tiny
        self.command = tiny.train_command(*own) if number == 1 else [*tiny.launch_command(), *own, *ranks]

    def newest_step(self) -> int:
        """The last step that metrics.jsonl tells of."""
        return max((line["step"] for line in self.tiny.lines()), default=0)

    def committed(self) -> list[int]:
        return list(CheckpointStore(self.tiny.directory / "checkpoints", 2).steps())

    def through(self, kinds: list[Kind]) -> int:
        """Strike until the kinds or the run are at their end; how many struck."""
        struck: tuple[Kind, float, int] | None = None
        for index, kind in enumerate(kinds):
            life = Live(self)
            began = len(self.tiny.events("start"))
            if not kind.early:
                life.wait(lambda began=began: len(self.tiny.events("start")) > began)
                first = self._resumed_at(life)
                self._take_note(life, struck, first)
                life.wait(lambda first=first: self.newest_step() >= first + self.chance.randrange(2, 9))
                time.sleep(self.chance.random() * 0.05)
            if life.process.poll() is not None and self.tiny.events("finish"):
                return index
            before, at = self.newest_step(), time.monotonic()
            saved = self.committed()
            struck = (kind, at, before) if not kind.early else None
            code = self._strike(kind, life)
            seen = self.seen[kind.name]
            seen.times, seen.codes[code] = seen.times + 1, seen.codes[code] + 1
            kept = self.committed()
            assert not saved or max(kept) >= max(saved), f"{kind.name}: {saved} became {kept}"
            print(f"{index + 1:4}  step {before:5}  {kind.name}: exit code {code}", flush=True)
        return len(kinds)

    def _resumed_at(self, life: Live) -> int:
        lives = self.tiny.events("start")
        life.wait(
            lambda: len(self.tiny.events("ready")) >= 1 and self.tiny.events("ready")[-1]["time"] >= lives[-1]["time"]
        )
        return int(self.tiny.events("ready")[-1]["step"])

    def _take_note(self, life: Live, struck: tuple[Kind, float, int] | None, first: int) -> None:
        if struck is None:
            return
        kind, at, before = struck
        if life.wait(lambda: self.newest_step() > first):
            self.seen[kind.name].seconds.append(time.monotonic() - at)
        self.seen[kind.name].again.append(max(0, before - first))

    def _strike(self, kind: Kind, life: Live) -> int:
        """Strike, and end the life; a kind that leaves it alive, or wants nobody there, is given a stop."""
        if kind.damages and self._sound() < 2:
            # Nothing is promised to a run whose only checkpoint is spoilt.
            kind = STOPPED_ONLY
        if kind.strike is not None:
            kind.strike(life, self.chance)
        if not kind.codes:
            life.send(signal.SIGTERM)
        # Whatever is done to it, a life may be at its end before.
        code = life.end((*(kind.codes or (75,)), 0))
        if kind.between is not None:
            kind.between(self.tiny.directory, self.chance)
        return code

    def _sound(self) -> int:
        store = CheckpointStore(self.tiny.directory / "checkpoints", 2)
        return sum(not store.verify(step) for step in store.steps())

    def finish(self) -> None:
        """Let it train to its end."""
        Live(self).end((0,), patience=_PATIENCE_SECONDS + self.tiny.steps)

    def state(self) -> dict[str, Any]:
        """Checksum of all weights and moments at the end."""
        store = CheckpointStore(self.tiny.directory / "checkpoints", 2)
        last = store.read(store.steps()[-1])
        assert not store.verify(last.step)
        return {"step": last.step, "checksum": last.meta[CHECKSUM]}


def differences(undisturbed: Soak, soak: Soak) -> list[str]:
    """What is not equal at the end of two runs. A line of metrics.jsonl that was torn after its step was committed is
    gone, and only such a one."""
    found = []
    if undisturbed.state() != soak.state():
        found.append(f"weights and moments: {soak.state()} instead of {undisturbed.state()}")
    wanted = {figures[0]: figures for figures in undisturbed.tiny.curve()}
    curve = {figures[0]: figures for figures in soak.tiny.curve()}
    found += [f"step {step}" for step, figures in curve.items() if wanted.get(step) != figures]
    missing, torn = sorted(wanted.keys() - curve.keys()), soak.seen[TORN].times
    if len(missing) > torn:
        found.append(f"lines of steps {missing} are missing, and {torn} were torn")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, default=0, help="of the run; default: ten a fault")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rxt-soak-"))
    shards = build_shards(folder / "data")
    steps = chosen.steps or 10 * chosen.faults
    runs = []
    for name in ("undisturbed", "soak"):
        (folder / name).mkdir()
        runs.append(Soak(folder / name, shards, steps, chosen.ranks, chosen.seed))
    undisturbed, soak = runs
    began = time.monotonic()
    undisturbed.finish()
    alone = time.monotonic() - began
    began = time.monotonic()
    struck = soak.through(drawn(chosen.faults, chosen.seed, chosen.ranks > 1))
    soak.finish()
    seconds = time.monotonic() - began
    wrong = differences(undisturbed, soak)
    print(table(soak, struck, seconds, alone, not wrong))
    if chosen.out:
        found = {name: vars(seen) for name, seen in soak.seen.items()}
        facts = {"faults": struck, "seed": chosen.seed, "ranks": chosen.ranks, "wrong": wrong, "seconds": seconds}
        chosen.out.write_text(json.dumps(facts | {"undisturbed_seconds": alone, "kinds": found}, indent=1) + "\n")
    assert not wrong, f"the run's end is not that of the undisturbed one ({'; '.join(wrong[:9])}); both are in {folder}"
    shutil.rmtree(folder)


def table(soak: Soak, struck: int, seconds: float, alone: float, equal: bool) -> str:
    """The result in Markdown."""
    lines = ["| fault | struck | exit codes | steps done again, median (most) | to a new step, median (most) |"]
    lines.append("|---|---|---|---|---|")
    for name, seen in sorted(soak.seen.items()):
        codes = ", ".join(str(code) for code in sorted(seen.codes))
        again = f"{statistics.median(seen.again):g} ({max(seen.again)})" if seen.again else ""
        new = f"{statistics.median(seen.seconds):.1f} s ({max(seen.seconds):.1f})" if seen.seconds else ""
        lines.append(f"| {name} | {seen.times} | {codes} | {again} | {new} |")
    end = "equal to those of the undisturbed run, bit by bit" if equal else "NOT those of the undisturbed run"
    lines.append(
        f"\n{struck} faults, {soak.tiny.steps} steps, {soak.number} rank(s): {seconds:.0f} s, alone {alone:.0f} s."
        f" Weights, moments and curve at the end are {end}."
    )
    shares = goodput(soak.tiny.directory, time.time()).share
    told = ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items() if share >= 0.0005)
    lines.append(f"\nWall time of the run, as `rxt-dist report` has it: {told}.")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
