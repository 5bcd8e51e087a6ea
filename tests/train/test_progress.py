"""The progress line: plain in a log, live on a terminal, silent on other ranks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from rxt_dist.train import progress as module
from rxt_dist.train.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_plain_lines_come_now_and_then_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1_000_000, enabled=True) as progress:
        for step in range(71):
            progress.update(100_000 + step * 1000, {"step": str(step), "loss": "3.21"})
            clock.now += 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split("step ")[1].split()[0] for line in lines] == ["0", "30", "60", "70"]
    assert lines[0] == " 10.0%  step 0  loss 3.21  100k of 1.00M tokens"
    # Measured in this life only: 1000 tokens a second, although 100,000 tokens are older.
    assert lines[1].endswith("130k of 1.00M tokens  1.00k tokens/s  14m 30s left")


def test_the_last_line_is_not_repeated(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, enabled=True) as progress:
        progress.update(1000, {})
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_messages_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "saved [bold]step-00000120[/bold] " + "x" * 200
    with Progress(1000, enabled=True) as progress:
        progress.message(text)
    assert capsys.readouterr().err == text + "\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, enabled=False) as progress:
        progress.update(10, {"loss": "3"})
        progress.message("hello")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0m 00s"), (428, "7m 08s"), (18_360, "5h 06m"), (273_600, "3d 4h"), (59.7, "1m 00s")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert module._duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999.4, "999"), (12_345, "12.3k"), (999_900, "1000k"), (4.56e6, "4.56M"), (4e11, "400B")],
)
def test_numbers(number: float, shown: str) -> None:
    assert module._short(number) == shown


def test_a_terminal_gets_a_live_line() -> None:
    code = """
from rxt_dist.train.progress import Progress
with Progress(1000, enabled=True) as progress:
    progress.update(500, {"loss": "3.21"})
    progress.message("a message")
    progress.update(1000, {"loss": "1.23 [b]"})
"""
    parent, child = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TERM": "xterm",
        "COLUMNS": "160",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=child, stdout=subprocess.PIPE, env=environment, check=True
    )
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    os.close(child)
    assert done.stdout == b""
    assert "a message" in shown
    assert "100%" in shown
    assert "loss 1.23 [b]" in shown


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_goes_away_ends_nothing(live: bool) -> None:
    """A lost ssh: whatever is written from then on is refused by the system."""
    code = """
import os, sys
from rxt_dist.train.progress import Progress
with Progress(1000, enabled=True) as progress:
    progress.update(500, {"loss": "3.21"})
    sys.stdin.readline()
    for _ in range(3):
        progress.message("to nobody")
        progress.update(700, {})
print("trained on", file=sys.stderr)
os.write(int(sys.argv[1]), b"done")
"""
    terminal, child = pty.openpty() if live else os.pipe()
    read, written = os.pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TERM": "xterm",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(written)],
        stdin=subprocess.PIPE, stderr=child, stdout=child, env=environment, pass_fds=[written],
    )  # fmt: skip
    os.close(child)
    os.close(terminal)
    process.communicate(b"gone\n", timeout=60)
    assert process.returncode == 0
    assert os.read(read, 10) == b"done"
