"""What the launcher says of how a life ended: once, of the rank with which it began, in its last words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scripted_ranks import TAKING, events, launched, script


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
