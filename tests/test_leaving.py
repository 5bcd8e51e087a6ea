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


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 75, ""),
        (">&-", 75, ""),
        ("> /dev/full", 75, "warning: the last lines of the output are lost: [Errno 28] No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_changes_no_exit_code(output: str, code: int, said: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(joins=JOINS, ends="sys.exit(75)").replace("sys.__stdout__", "sys.stderr"))
    command = ["bash", "-c", f"{sys.executable} {program} {output}"]
    done = subprocess.run(command, capture_output=True, text=True, env=BUFFERED, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_a_library_of_c_holds_back_is_written() -> None:
    joins = f"import ctypes; atexit.register(ctypes.CDLL(None).printf, b'of C. '); {JOINS}"
    assert ended(joins, "sys.exit(0)")[:2] == (0, "main. handler. of C. ")


def test_a_signal_ends_a_process_as_ever() -> None:
    assert ended(JOINS, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")[0] == -15
    assert ended(JOINS, "raise KeyboardInterrupt")[0] == -2
