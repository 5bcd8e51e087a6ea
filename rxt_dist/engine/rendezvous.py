"""How ranks find each other: a key-value store that rank 0 serves, and the process group that is made on it.

torch's own start of a group listens on all interfaces. Whoever reaches that port can write into the store, so here rank
0 listens on the interface alone by which the ranks address it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from rxt_dist.errors import UnavailableError

# How long ranks wait for each other at the start: on a cluster a job's last node may begin minutes after the first.
START_TIMEOUT = timedelta(minutes=10)
_EVERYWHERE = "0.0.0.0"


def join_ranks(device: torch.device, timeout: timedelta) -> None:
    """Make the process group of this run (NCCL on GPUs, gloo on CPU) from the environment's variables.

    Args:
        timeout: after which a collective operation that other ranks have not joined fails.

    Raises:
        UnavailableError: the port is taken, or rank 0 cannot be reached.
    """
    cuda = device.type == "cuda"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=_connect(rank, serve=rank == 0),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )


def side_channel(purpose: str) -> dist.Store | None:
    """A connection of its own to the store of this run, its keys apart from those of other purposes; None where there
    is no process group.

    For what threads tell each other across ranks while the main threads compute: collective operations belong to the
    main thread. Of one connection only one thread can wait at a time.
    """
    if not dist.is_initialized():
        return None
    return dist.PrefixStore(purpose, _connect(dist.get_rank(), serve=False))


def _connect(rank: int, serve: bool) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent serves a store on this port already.
    listener = _listen(host, port) if serve and not _agent_serves(os.environ) else None
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=listener is not None,
            timeout=START_TIMEOUT,
            wait_for_workers=False,
            # The store closes it.
            master_listen_fd=listener.detach() if listener else None,
        )
    except dist.DistError as error:
        raise UnavailableError(
            f"Rank {rank} does not reach rank 0 at {host}:{port} ({_first_line(error)}). Look at what rank 0 says, and "
            f"whether MASTER_ADDR and MASTER_PORT are those of its machine."
        ) from error
    return dist.PrefixStore(_life(os.environ), store)


def _life(environ: Mapping[str, str]) -> str:
    """What keeps the keys of this life apart: torchrun's agent serves one store to all lives that it starts, also to
    those that it starts with fewer ranks after a node has left, which it does not count."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE")
    return "/".join(["rxt", *(environ.get(name, "0") for name in names)])


def _agent_serves(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen(host: str, port: int) -> socket.socket:
    address = listening_address(host)
    everywhere = address == _EVERYWHERE and socket.has_dualstack_ipv6()
    address = "::" if everywhere else address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if everywhere:  # Others may know this machine by either kind of address.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        _refuse(address, port, error)
    return listener


def _refuse(address: str, port: int, error: OSError) -> NoReturn:
    taken = error.errno == errno.EADDRINUSE
    raise UnavailableError(
        f"Rank 0 cannot listen on {address}:{port} ({'another process does' if taken else error.strerror}). "
        f"{'Start again, on another MASTER_PORT' if taken else 'Set MASTER_ADDR to an address of its machine'}."
    ) from error


def listening_address(host: str) -> str:
    """The address of this machine at which ranks that know it as `host` reach it.

    A name that leads to loopback here may lead elsewhere on other machines (Debian writes a machine's own name so into
    its hosts file): then all addresses are listened on.
    """
    try:
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return _EVERYWHERE
    loopback = [ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses]
    for address, is_loopback in zip(addresses, loopback, strict=True):
        if not is_loopback or host in ("localhost", address):
            return address
    return _EVERYWHERE


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")
