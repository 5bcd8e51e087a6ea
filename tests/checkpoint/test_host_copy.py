"""The copy that training goes on beside: all of a state, in memory that every save uses again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from rxt_dist.checkpoint import host_copy
from rxt_dist.checkpoint.host_copy import HostCopy
from rxt_dist.checkpoint.writing import Share
from rxt_dist.engine.interface import KINDS, Fragment

CPU = torch.device("cpu")


def share(*sizes: int) -> Share:
    fragments = [
        Fragment(f"p{number}", number, {kind: torch.randn(size, requires_grad=kind == "weight") for kind in KINDS})
        for number, size in enumerate(sizes)
    ]
    return Share(0, fragments, {"counts": torch.arange(3)})


def same(one: Share, other: Share) -> bool:
    pairs = zip(one.fragments, other.fragments, strict=True)
    return torch.equal(one.routing["counts"], other.routing["counts"]) and all(
        (first.name, first.start) == (second.name, second.start)
        and all(torch.equal(first.tensors[kind], second.tensors[kind]) for kind in KINDS)
        for first, second in pairs
    )


@pytest.mark.parametrize("block", [1, 3, 4, 1 << 22])
def test_every_block_of_every_tensor_is_copied(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "_BLOCK_ELEMENTS", block)
    taken = share(7, 1, 12)
    copies = HostCopy(CPU)
    copied = copies.begin(taken, 0)
    copies.before_change()
    assert same(copied, taken)
    with torch.no_grad():
        for fragment in taken.fragments:
            for tensor in fragment.tensors.values():
                tensor += 1
    assert not any(
        torch.equal(first.tensors[kind], second.tensors[kind])
        for first, second in zip(copied.fragments, taken.fragments, strict=True)
        for kind in KINDS
    )


def test_the_memory_is_used_again_and_given_back() -> None:
    copies = HostCopy(CPU)
    places = {taken(copies, share(5, 9)).fragments[0].tensors["weight"].data_ptr() for _ in range(3)}
    assert len(places) == 1
    other = share(6)
    assert same(taken(copies, other), other)
    copies.close()
    assert same(taken(copies, other), other)


def taken(copies: HostCopy, share: Share, constant: int = 0) -> Share:
    copied = copies.begin(share, constant)
    copies.complete()
    return copied


def test_it_goes_on_while_the_share_is_read_and_what_changes_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()
    real = host_copy.np.copyto

    def wait(target: Any, source: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        real(target, source)

    monkeypatch.setattr(host_copy.np, "copyto", wait)
    copies, given = HostCopy(CPU), share(3)
    copied = copies.begin(given, 0)
    assert begun.wait(10)
    expected = given.fragments[0].tensors["weight"].detach().clone()
    threading.Timer(0.05, go_on.set).start()
    copies.before_change()
    with torch.no_grad():
        given.fragments[0].tensors["weight"].zero_()
    copies.complete()
    assert torch.equal(copied.fragments[0].tensors["weight"], expected)


class FakeEvent:
    """An event that is recorded at the time that the clock shows then."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = -1.0

    def synchronize(self) -> None:
        assert self.at >= 0.0

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


def test_the_wait_of_a_device_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue stands for two seconds, in which the host goes on."""

    class Stream:
        def record_event(self, event: FakeEvent) -> None:
            event.at = FakeEvent.clock

        def wait_event(self, event: Any) -> None:
            assert event == "copied"
            FakeEvent.clock += 2.0

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    copies = HostCopy(CPU)
    taken(copies, share(3))
    assert copies.device_wait() == 0.0
    copies._copied = "copied"  # type: ignore[assignment]
    copies.before_change()
    assert copies.device_wait() == 2.0
    copies._copied = None
    taken(copies, share(3))
    copies.before_change()
    assert copies.device_wait() == 0.0, "the wait for an earlier copy counts once"


def test_a_copy_that_nobody_asked_for_ends_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    real, go_on = host_copy.np.copyto, threading.Event()

    def wait(target: Any, source: Any) -> None:
        assert go_on.wait(10)
        real(target, source)

    monkeypatch.setattr(host_copy.np, "copyto", wait)
    copies, first, second = HostCopy(CPU), share(3), share(3)
    copies.begin(first, 0)
    threading.Timer(0.05, go_on.set).start()
    assert same(taken(copies, second), second)
    assert go_on.is_set()


def test_a_copy_that_fails_is_told_to_who_writes_it_and_the_next_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, given = HostCopy(CPU), share(3)
    with monkeypatch.context() as patch:
        patch.setattr(host_copy.np, "copyto", lambda *_: 1 / 0)
        copies.begin(given, 0)
        copies.before_change()
        with pytest.raises(ZeroDivisionError):
            copies.complete()
    assert same(taken(copies, given), given)


def test_what_does_not_change_is_not_copied() -> None:
    given = share(4, 5)
    copied = taken(HostCopy(CPU), given, 1)
    assert copied.fragments[1] is given.fragments[1]
    assert same(copied, given)
    assert same(taken(HostCopy(CPU), given, 2), given)
