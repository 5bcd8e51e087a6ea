"""The kinds of faults that a soak draws from: what is done to a life of a run, or to its files between two lives.

A kind says with which exit codes the life may end. Whatever it does, nothing committed may be lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_HANG = 87
TORN = "metrics.jsonl torn"


class Life(Protocol):
    """A life that goes on."""

    directory: Path

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        ...

    def send(self, number: int) -> None:
        """A signal to what was started."""
        ...

    def begin_another(self) -> int:
        """Start the same run beside this one; its exit code."""
        ...

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so; False if the life ended before."""
        ...


@dataclass(frozen=True)
class Kind:
    """strike: what is done to a life, once it has made some steps (or `early`: at once). codes: with which it may end;
    empty: it must go on. between: what is done to the run directory while nobody trains. damages: that spoils the
    newest checkpoint, so that another one must be there."""

    name: str
    strike: Callable[[Life, random.Random], None] | None = None
    codes: tuple[int, ...] = ()
    between: Callable[[Path, random.Random], None] | None = None
    early: bool = False
    ranks: bool = False
    damages: bool = False


def _kill_a_rank(life: Life, chance: random.Random) -> None:
    os.kill(chance.choice(life.ranks()), signal.SIGKILL)


def _kill_all(life: Life, chance: random.Random) -> None:
    for rank in life.ranks():
        os.kill(rank, signal.SIGKILL)


def _kill_while_saving(life: Life, chance: random.Random) -> None:
    folder = life.directory / "checkpoints"
    life.wait(lambda: any(folder.glob("step-*.tmp")))
    time.sleep(chance.random() * 0.01)
    _kill_a_rank(life, chance)


def _kill_early(life: Life, chance: random.Random) -> None:
    time.sleep(chance.random() * 0.5)
    _kill_a_rank(life, chance)


def _signal(number: int) -> Callable[[Life, random.Random], None]:
    return lambda life, chance: life.send(number)


def _stop_file(life: Life, chance: random.Random) -> None:
    (life.directory / "STOP").touch()


def _freeze(life: Life, chance: random.Random) -> None:
    os.kill(chance.choice(life.ranks()), signal.SIGSTOP)


def _pause(life: Life, chance: random.Random) -> None:
    """As a machine does that is suspended, for longer than a step may take."""
    ranks = life.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    time.sleep(2.5 + chance.random())
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def _hold_up(life: Life, chance: random.Random) -> None:
    """One rank, for less than a step may take."""
    rank = chance.choice(life.ranks())
    os.kill(rank, signal.SIGSTOP)
    time.sleep(chance.random())
    os.kill(rank, signal.SIGCONT)


def _supersede(life: Life, chance: random.Random) -> None:
    """As if the machine had been cut off, and the run started again elsewhere."""
    path = life.directory / "life.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"life": "of another machine"}))


def _second_launch(life: Life, chance: random.Random) -> None:
    code = life.begin_another()
    assert code == 64, f"a second launch beside a run ended with {code} instead of 64"


def flip_a_bit(path: Path, chance: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _newest(directory: Path) -> Path:
    return max((directory / "checkpoints").glob("step-????????"))


def _flip(pattern: str) -> Callable[[Path, random.Random], None]:
    def strike(directory: Path, chance: random.Random) -> None:
        flip_a_bit(chance.choice(sorted(_newest(directory).glob(pattern))), chance)

    return strike


def _tear(name: str) -> Callable[[Path, random.Random], None]:
    def strike(directory: Path, chance: random.Random) -> None:
        path = directory / name
        os.truncate(path, path.stat().st_size - chance.randrange(1, 40))

    return strike


def _remove(name: str) -> Callable[[Path, random.Random], None]:
    def strike(directory: Path, chance: random.Random) -> None:
        path = directory / name
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)

    return strike


def _leftover(directory: Path, chance: random.Random) -> None:
    folder = directory / f"checkpoints/step-{chance.randrange(10**6):08d}.tmp"
    folder.mkdir(exist_ok=True)
    (folder / "rank-00000.safetensors").write_bytes(b"half of it")


def _latest_is_a_folder(directory: Path, chance: random.Random) -> None:
    latest = directory / "checkpoints/latest"
    if not latest.is_dir():
        latest.unlink(missing_ok=True)
        latest.mkdir()


KINDS = [
    Kind("SIGKILL of a rank", _kill_a_rank, (*KILLED, 1)),
    Kind("SIGKILL of all ranks", _kill_all, KILLED),
    Kind("SIGKILL while saving", _kill_while_saving, (*KILLED, 1)),
    Kind("SIGKILL during the start", _kill_early, (*KILLED, 1), early=True),
    Kind("SIGTERM", _signal(signal.SIGTERM), (75,)),
    Kind("SIGUSR2", _signal(signal.SIGUSR2), (75,)),
    Kind("SIGHUP", _signal(signal.SIGHUP), (75,)),
    Kind("STOP file", _stop_file, (76,)),
    Kind("SIGSTOP of a rank", _freeze, (_HANG,), ranks=True),
    Kind("SIGKILL of the launcher", _signal(signal.SIGKILL), KILLED, ranks=True),
    Kind("all ranks paused", _pause),
    Kind("a rank held up", _hold_up),
    Kind("another life took the run", _supersede, (65,)),
    Kind("a second launch", _second_launch),
    Kind("a bit of a checkpoint's tensors", between=_flip("*.safetensors"), damages=True),
    Kind("a bit of a manifest", between=_flip("manifest.json"), damages=True),
    Kind(TORN, between=_tear("metrics.jsonl")),
    Kind("events.jsonl torn", between=_tear("events.jsonl")),
    Kind("latest gone", between=_remove("checkpoints/latest")),
    Kind("latest a folder", between=_latest_is_a_folder),
    Kind("configuration gone", between=_remove("config.resolved.yaml")),
    Kind("life.json gone", between=_remove("life.json")),
    Kind("half a checkpoint left", between=_leftover),
]


STOPPED_ONLY = next(kind for kind in KINDS if kind.name == "SIGTERM")


def drawn(number: int, seed: int, with_ranks: bool) -> list[Kind]:
    """So many kinds: each as often as the others, in an order of the seed."""
    kinds = [kind for kind in KINDS if with_ranks or not kind.ranks]
    many: list[Any] = [kinds[index % len(kinds)] for index in range(number)]
    random.Random(seed).shuffle(many)
    return many
