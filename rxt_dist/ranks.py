"""Who this process is among the ranks: read once from the environment that torchrun, srun or the launcher set."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from rxt_dist.errors import ConfigError

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_PORTS = 1 << 16
# A number of more is a slip, and Python refuses to read one of thousands.
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Ranks:
    """This process's number, the number of all, and its number on its node (which GPU it takes)."""

    rank: int
    world_size: int
    local_rank: int


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """The ranks that torchrun's variables state, else SLURM's; without either, the only rank of a world of one.

    Raises:
        ConfigError: where only some of a family's variables are set, or their numbers contradict each other.
    """
    for family in (_TORCH, _SLURM):
        missing = [name for name in family if name not in environ]
        if len(missing) == len(family):
            continue
        if missing:
            raise ConfigError(
                f"The environment sets only some of {', '.join(family)}: {', '.join(missing)} is missing. "
                f"Start ranks with torchrun, srun or `rxt-dist launch local`, or unset the others to run one rank."
            )
        return _checked(family, [environ[name] for name in family])
    return Ranks(0, 1, 0)


def _checked(names: tuple[str, ...], values: list[str]) -> Ranks:
    shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    try:
        ranks = Ranks(*map(int, values))
    except ValueError:
        raise ConfigError(f"The environment's ranks must be whole numbers, but are {shown}.") from None
    if not (0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.world_size):
        raise ConfigError(f"The environment's ranks contradict each other: {shown}; a rank lies below the world size.")
    return ranks


def export_ranks(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set the variables by which torch.distributed finds the other ranks.

    MASTER_ADDR and MASTER_PORT stay where they are set. Under SLURM they are derived, the same on every rank: the
    first host of the job, and a port from the job's id and its number of restarts, so that neither two jobs on one
    node nor two lives of one job meet on a port.

    Raises:
        ConfigError: more than one rank and nothing that says where rank 0 listens, or what should be a number is none.
    """
    environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    if "MASTER_PORT" in environ and not 0 < _number(environ, "MASTER_PORT") < _PORTS:
        raise ConfigError(f"MASTER_PORT is {environ['MASTER_PORT']}, but a port lies between 1 and {_PORTS - 1}.")
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return
    if ranks.world_size == 1:
        address, port = "127.0.0.1", free_port()
    elif "SLURM_JOB_NODELIST" in environ and "SLURM_JOB_ID" in environ:
        address = first_host(environ["SLURM_JOB_NODELIST"])
        life = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
        port = 10000 + (_number(environ, "SLURM_JOB_ID") + 7 * life) % 20000
    else:
        raise ConfigError(
            f"MASTER_ADDR and MASTER_PORT are not both set, so {ranks.world_size} ranks cannot find each other. "
            f"Start them with torchrun, srun or `rxt-dist launch local`, or set both."
        )
    environ.setdefault("MASTER_ADDR", address)
    environ.setdefault("MASTER_PORT", str(port))


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ConfigError(f"{name} is '{text}' in the environment, but must be a whole number. Mend it, or unset it.")
    return int(text)


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[007-012,020],login1` gives `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodelist)


def free_port() -> int:
    """A port that is free now; ports reused within seconds fail at random, so take a new one for every start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
