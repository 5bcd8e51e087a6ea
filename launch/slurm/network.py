"""Where ranks on several nodes meet: a port, and the interface by which a node reaches the others."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import zlib
from collections.abc import Sequence

# Below the ports that systems give to clients (from 32768), above those of services.
_FIRST_PORT, _PORTS = 10_000, 20_000
_TRIES = 50
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def choose_port(label: str, here: bool) -> int:
    """A port for one start of the ranks of a job: of its own for each label, and free where that can be seen.

    Args:
        label: job and life. here: whether rank 0 will be on this machine.
    """
    first = zlib.crc32(label.encode()) % _PORTS
    ports = [_FIRST_PORT + (first + 37 * turn) % _PORTS for turn in range(_TRIES)]
    return next((port for port in ports if _is_free(port)), ports[0]) if here else ports[0]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # Connections of an earlier life that wait for their last packets are no hindrance; a listener is.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True


def interface_towards(own: str, hosts: Sequence[str]) -> str | None:
    """Name of the interface by which this node reaches the others of its job; `lo` if there is none but itself.

    A name of its own may lead a node to its loopback interface, so another node's is asked for. None: nobody can tell.
    """
    others = [host for host in hosts if host != own]
    if not others:
        return "lo"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the system only chooses a way.
            probe.connect((others[0], 9))
            address = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == address), None)


def _address(interface: str) -> str | None:
    request = array.array("B", struct.pack("256s", interface.encode()[:15]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request, True)
        except OSError:
            return None
    return socket.inet_ntoa(request[20:24].tobytes())
