"""What the launcher says of how a life ended: once, of the rank with which it began, in its last words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scripted_ranks import TAKING, events, launched, script

from launch import endings


def test_a_killed_rank_is_said_once_with_its_last_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other rank loses its connection, first or last: of that nothing is shown."""
    code = (
        TAKING
        + """
(run / "metrics.jsonl").write_text('{"step": 7}\\n')
if rank == 1:
    (run / "logs/rank-00001.log").write_text("".join(f"line {n}\\n" for n in range(100)))
    os.kill(os.getpid(), 9)
words("Traceback\\n" + 100 * "deep\\n" + "RuntimeError: Connection closed by peer")
sys.exit(1)
"""
    )
    (tmp_path / "logs").mkdir()
    assert launched(script(code, tmp_path), 2, run=tmp_path) == 137
    said = capfd.readouterr().err
    assert said.count("rank 1 was killed by signal 9 (out of memory?)") == 1
    assert "line 84" not in said
    assert "line 85" in said
    assert "line 99" in said
    assert "deep" not in said
    (event,) = events(tmp_path, "exit")
    assert (event["code"], event["reason"], event["step"]) == (137, "rank 1 was killed by signal 9 (out of memory?)", 7)
    assert event["life"] == json.loads((tmp_path / "life.json").read_text())["life"]
    assert "rank 1 was killed by signal 9" in (tmp_path / "logs/launcher.log").read_text()


def test_lives_that_die_before_they_begin_are_logged_once_one_has_begun(tmp_path: Path) -> None:
    code = "import os, sys; os.environ['RXT_ATTEMPT'] > '0' and sys.exit(1)\n" + TAKING + "sys.exit(1)"
    assert launched(script(code, tmp_path), 1, attempts=2, run=tmp_path) == 1
    log = (tmp_path / "logs/launcher.log").read_text()
    assert [f"restart {attempt}: 1 ranks" in log for attempt in range(3)] == [True] * 3
    assert len(re.findall(r"life \w+ ended with exit code 1:", log)) == 3
    assert len(events(tmp_path, "exit")) == 1, "of a life that the run knows nothing of it is told nothing"


def test_an_exit_that_the_run_has_told_is_not_told_again(tmp_path: Path) -> None:
    code = (
        TAKING
        + """
if rank == 0:
    (run / "events.jsonl").write_text(json.dumps({"kind": "exit", "code": 65, "life": life}) + "\\n")
sys.exit(65)
"""
    )
    assert launched(script(code, tmp_path), 2, run=tmp_path) == 65
    assert len(events(tmp_path, "exit")) == 1


def test_the_traceback_of_the_rank_that_failed_first_is_shown(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rank 0 meets the end of rank 1, and is the first whose process ends."""
    code = """
import os, pathlib, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
(folder / rank).touch()
while not (folder / "1").exists():
    time.sleep(0.01)
time.sleep(0.1 * (rank == "1"))
text = {"0": "RuntimeError: Connection closed by peer", "1": "ZeroDivisionError: my bug"}[rank]
pathlib.Path(os.environ["RXT_LAST_WORDS"]).write_text("Traceback\\n" + text)
os._exit(1)
"""
    assert launched(script(code, tmp_path), 2) == 1
    said = capfd.readouterr().err
    assert "rank 1 failed: ZeroDivisionError: my bug" in said
    assert "closed by peer" not in said


def test_an_error_of_all_ranks_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import os, pathlib, sys
pathlib.Path(os.environ["RXT_LAST_WORDS"]).write_text("error: Row 7 is damaged. Repair it.\\n")
sys.exit(65)
"""
    assert launched(script(code), 3) == 65
    assert capfd.readouterr().err == "error: Row 7 is damaged. Repair it.\n"


def test_what_a_rank_prints_while_it_imports_is_shown_if_it_ends_there(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; print('loading'); sys.exit('no such module' if os.environ['RANK'] == '1' else 0)"
    assert launched(script(code), 2) == 1
    out, err = capfd.readouterr()
    assert out == "loading\n"
    assert "rank 1 ended with exit code 1; the last lines:\n  loading\n  no such module" in err


# What stands in a rank's output when native code ends it: what the library said, then stacks.
CRASH = """
import ctypes, faulthandler, os, sys, threading, time
if os.environ["RANK"] == "0":
    time.sleep(60)
faulthandler.enable(2)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
for line in range(30):
    os.write(2, f"line {line}\\n".encode())
os.write(2, b"terminate called after an error of the network\\n")
def deep(frames):
    HOW if frames == 0 else deep(frames - 1)
deep(40)
"""
# A function of C as the whole of a thread that Python does not know.
IN_A_THREAD = (
    "(ctypes.CDLL(None).pthread_create(ctypes.byref(ctypes.c_ulong()), None,"
    " ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p), None), time.sleep(60))"
)


def test_of_a_crash_in_native_code_its_words_and_its_place_are_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert launched(script(CRASH.replace("HOW", "os.abort()")), 2) == 134
    err = capfd.readouterr().err
    assert "rank 1 was killed by signal 6 (SIGABRT); the last lines:" in err
    shown = [line.strip() for line in err[err.index("the last lines:") :].splitlines()[1:16]]
    assert shown[5:8] == ["line 29", "terminate called after an error of the network", "Fatal Python error: Aborted"]
    assert shown[8].startswith("Current thread")
    assert all(line.endswith("in deep") for line in shown[9:15])


def test_a_thread_of_a_library_that_crashes_has_no_place_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    assert launched(script(CRASH.replace("HOW", IN_A_THREAD)), 2) == 134
    err = capfd.readouterr().err
    assert "error of the network" in err
    assert "in deep" not in err
    assert "Thread 0x" not in err, "nor that of another thread"


def test_a_crash_of_an_earlier_life_is_not_shown() -> None:
    earlier = ["Fatal Python error: Aborted", "", "Current thread 0x1 (most recent call first):", '  File "a.py"', ""]
    assert endings._crash([*earlier, "this life"]) == []
    assert endings._crash(["words", *earlier]) == ["words", *earlier[:1], *earlier[2:4]]
