"""The catalogue of planted faults fits the code as it is now; `tests/planted/plant.py` tries them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from planted import plant
from planted.plant import ROOT, Fault, read_faults, try_fault

FAULTS = read_faults()


@cache
def parsed(file: str) -> str:
    return ast.dump(ast.parse((ROOT / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_code_that_is_there(fault: Fault) -> None:
    planted = fault.planted((ROOT / fault.file).read_text(encoding="utf-8"))
    # Another program that Python can read: neither a comment nor a slip of the pen.
    assert ast.dump(ast.parse(planted)) != parsed(fault.file)
    for argument in fault.tests:
        assert (ROOT / argument.split("::")[0]).exists(), argument


def test_there_are_faults_for_every_room_that_decides_numbers() -> None:
    rooms = {fault.file.rsplit("/", 1)[0] for fault in FAULTS}
    wanted = ("model", "stages", "engine", "data", "checkpoint", "train")
    assert {f"rxt_dist/{room}" for room in wanted} <= rooms
    assert any(room.startswith("data_prep") for room in rooms)
    assert len(FAULTS) >= 83


def a_tree(folder: Path, test: str) -> Path:
    folder.mkdir()
    (folder / "answer.py").write_text("ANSWER = 42\n")
    (folder / "test_answer.py").write_text(test)
    return folder


@pytest.mark.slow
def test_a_fault_is_found_survives_or_proves_nothing(tmp_path: Path) -> None:
    """And the tree is as before, whatever came of it."""
    found = a_tree(tmp_path / "found", "from answer import ANSWER\ndef test_it():\n    assert ANSWER == 42\n")
    wrong = Fault("wrong answer", "answer.py", "42", "43", ("test_answer.py",))
    verdict = try_fault(found, wrong)
    assert verdict.found
    assert "test_it" in verdict.by
    assert (found / "answer.py").read_text() == "ANSWER = 42\n"
    broken = try_fault(found, Fault("no code", "answer.py", "42", "(", ("test_answer.py",)))
    assert not broken.found
    assert "proves nothing" in broken.by
    with pytest.raises(ValueError, match="stands 0 times"):
        try_fault(found, Fault("stale", "answer.py", "41", "43", ("test_answer.py",)))


@pytest.mark.parametrize(("own", "found"), [(plant.ENDLESS, True), (plant.PASSED, False)])
def test_a_hanging_program_is_found_by_its_own_tests_and_proves_nothing_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, found: bool
) -> None:
    codes = {("test_answer.py",): own, plant.EVERYTHING: plant.ENDLESS}
    monkeypatch.setattr(plant, "run_tests", lambda tree, tests: (codes[tests], "no end"))
    verdict = try_fault(a_tree(tmp_path / "tree", ""), Fault("hang", "answer.py", "42", "43", ("test_answer.py",)))
    assert verdict.found is found
    assert ("proves nothing" in verdict.by) is not found


@pytest.mark.slow
def test_what_its_own_tests_miss_is_tried_against_all(tmp_path: Path) -> None:
    tree = a_tree(tmp_path / "tree", "def test_nothing():\n    pass\n")
    (tree / "tests").mkdir()
    (tree / "tests/test_all.py").write_text("from answer import ANSWER\ndef test_all():\n    assert ANSWER\n")
    assert not try_fault(tree, Fault("unseen", "answer.py", "42", "43", ("test_answer.py",))).found
    verdict = try_fault(tree, Fault("seen by another", "answer.py", "42", "0", ("test_answer.py",)))
    assert verdict.found
    assert "test_all" in verdict.by
