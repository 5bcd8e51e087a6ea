"""A process with native threads ends without Python's own end, and otherwise as any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# `main` stands in for a verb; a witness says whether Python took its modules down.
PROGRAM = """
import atexit, sys
from rxt_dist.leaving import native_threads_remain, run_program

class Witness:
    def __del__(self, write=sys.__stdout__.write, flush=sys.__stdout__.flush):
        write("taken down. ")
        flush()

witness = Witness()

def main():
    {joins}
    atexit.register(print, "handler.", end=" ")
    print("main.", end=" ")
    {ends}

run_program(main)
"""
JOINS = "native_threads_remain()"
# What a program has not written by its end is written then.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def ended(joins: str, ends: str) -> tuple[int, str, str]:
    program = PROGRAM.format(joins=joins, ends=ends)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=BUFFERED, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("pass", 0, ""),
        ("sys.exit('in words')", 1, "in words\n"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
def test_a_process_ends_with_its_code_its_output_and_its_handlers(ends: str, code: int, said: str) -> None:
    for joins, down in ((JOINS, ""), ("pass", "taken down. ")):
        found, output, errors = ended(joins, ends)
        assert (found, output) == (code, f"main. handler. {down}")
        assert errors.endswith(said)
        assert bool(errors) == bool(said)


def test_a_thread_that_wants_the_interpreter_at_the_end_does_not_kill_the_process() -> None:
    """As in pytorch/pytorch#38228: without it, SIGABRT now and then."""
    joins = f"""import threading, torch
    def endlessly():
        a = torch.ones(100)
        while True:
            a + a
    for _ in range(4):
        threading.Thread(target=endlessly, daemon=True).start()
    {JOINS}"""
    assert ended(joins, "sys.exit(0)")[:2] == (0, "main. handler. ")


def test_whoever_stops_reading_changes_no_exit_code(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(joins=JOINS, ends="sys.exit(75)"))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {program} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env=BUFFERED,
        timeout=60,
    )
    assert done.stdout == "75\n", done.stderr
