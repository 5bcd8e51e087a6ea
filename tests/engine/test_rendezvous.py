"""Where rank 0 listens, and what is said when ranks cannot meet."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from rxt_dist.engine import rendezvous
from rxt_dist.engine.rendezvous import listening_address
from rxt_dist.errors import UnavailableError


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize(
    ("host", "addresses", "listened"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("10.1.2.3", ["10.1.2.3"], "10.1.2.3"),
        ("gpu001", ["10.1.2.3"], "10.1.2.3"),
        ("gpu001", ["127.0.1.1", "10.1.2.3"], "10.1.2.3"),
        # Debian's hosts file; the other machines know another address.
        ("gpu001", ["127.0.1.1"], "0.0.0.0"),
    ],
)
def test_rank_0_listens_where_others_reach_it_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, host: str, addresses: list[str], listened: str
) -> None:
    resolving(monkeypatch, *addresses)
    assert listening_address(host) == listened


def test_a_name_that_is_unknown_here_may_be_known_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert listening_address("gpu001") == "0.0.0.0"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="a machine without IPv6")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_name_of_loopback_alone_is_reached_by_both_kinds_of_address(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Other machines may know the name by an address of the other kind."""
    with monkeypatch.context() as hosts:
        resolving(hosts, "::1")
        listener = rendezvous._listen("gpu001", 0)
    with listener, socket.create_connection((address, listener.getsockname()[1]), timeout=5):
        pass


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{port} \(another process does\).*MASTER_PORT"):
            rendezvous._connect(0, serve=True)


def test_a_life_that_torchrun_starts_again_does_not_hear_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent serves one store to all of them."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def life(restarts: int, ranks: int = 2) -> dist.Store:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return rendezvous._connect(0, serve=True)

    assert life(0).compare_set("verdict", "", "first") == b"first"
    assert life(0).compare_set("verdict", "", "second") == b"first"
    assert not life(1).check(["verdict"])
    assert not life(0, ranks=1).check(["verdict"])
