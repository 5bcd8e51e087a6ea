"""Ports and interfaces of a job."""

from __future__ import annotations

import socket

from launch.slurm.network import choose_port, interface_towards


def test_jobs_lives_and_steps_have_ports_of_their_own() -> None:
    labels = [f"{job}.{restart}.{attempt}" for job in range(100, 120) for restart in range(3) for attempt in range(3)]
    ports = {choose_port(label, here=False) for label in labels}
    # By chance two of 180 labels meet among 20,000 ports in most draws; what meets on one machine is told apart there.
    assert len(ports) > len(labels) - 10
    assert all(10_000 <= port < 30_000 for port in ports)
    assert choose_port("1.0.0", here=False) == choose_port("1.0.0", here=False)


def test_a_port_that_another_job_has_taken_is_passed_over() -> None:
    port = choose_port("5.0.0", here=True)
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert choose_port("5.0.0", here=False) == choose_port("5.0.0", here=False)
        assert choose_port("5.0.0", here=True) != port


def test_the_interface_is_the_one_that_leads_to_the_others() -> None:
    assert interface_towards("gpu01", ["gpu01"]) == "lo"
    assert interface_towards("gpu01", ["gpu01", "127.0.0.1"]) == "lo"
    assert interface_towards("gpu01", ["gpu01", "no.such.host.invalid"]) is None
