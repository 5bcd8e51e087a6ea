"""One process per rank: its environment, and how it is started and sent signals."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rxt_dist.lives import STOP_SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Rank:
    """A rank that was started; its number, its process, and where its last words and its early output are kept."""

    number: int
    process: subprocess.Popen[bytes]
    words: Path
    output: Path

    @property
    def is_suspended(self) -> bool:
        """Whether a signal (SIGSTOP) has stopped it, so that it answers nothing."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            return False
        return state == "T"


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one rank: torchrun's variables, its share of the cores, the CPU accelerator without a GPU.

    Ranks of one machine meet on its loopback interface, which nobody else reaches.
    """
    environment = dict(base)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    if "lo" in (name for _, name in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not _has_gpu(base):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def start(command: Sequence[str], environment: Mapping[str, str], rank: int, folder: Path) -> Rank:
    """Start one rank. The first keeps the terminal; what others print before they have a log file goes into `folder`.

    Args:
        environment: of the rank; it names `Rank.words` already.
    """
    output = folder / f"output-{rank}"
    words = words_file(folder, rank)
    parent = os.getpid()
    with open(output, "wb") as file:
        stream = None if rank == 0 else file
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=stream,
            # Ctrl-C on the terminal reaches the ranks once, through this process.
            start_new_session=True,
            preexec_fn=lambda: _prepare(parent),
        )
    return Rank(rank, process, words, output)


def words_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves the error that ends it."""
    return folder / f"words-{rank}"


def send(ranks: Sequence[Rank], number: int) -> None:
    """Send a signal to each; one that has ended meanwhile gets none."""
    for rank in ranks:
        rank.process.send_signal(number)


def _prepare(parent: int) -> None:
    """In the new process, before the command: ignore what would kill an import, and die with the launcher.

    Ranks that outlived a killed launcher would write into the run directory beside those of the next start.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether a GPU device exists and is not hidden; asking torch would cost its import."""
    if environment.get("CUDA_VISIBLE_DEVICES", "any") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
