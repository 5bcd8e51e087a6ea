"""`rxt-dist diff`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rxt_dist.cli import app, main


def run_of(path: Path, norm: float, *, checksum: int = 1, layers: int = 1) -> str:
    from rxt_dist.checkpoint.store import CheckpointStore

    path.mkdir()
    (path / "config.resolved.yaml").write_text(f"name: {path.name}\noutput: runs\noptimizer: {{lr: {norm}}}\n")
    (path / "environment.json").write_text(json.dumps({"host": path.name}))
    figures = {"grad_norm": norm, "expert_load_max": [norm] * layers, "step_s": norm * 100}
    lines = [{"step": 1, "grad_norm": 1.0, "expert_load_max": [1.0] * layers}, {"step": 2, **figures}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = CheckpointStore(path / "checkpoints", 2)
    weights = store.begin(2) / "weights"
    weights.write_bytes(b"x")
    store.commit(2, [store.record(weights)], {"state_checksum": checksum})
    return str(path)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["diff", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_equal_runs(tmp_path: Path) -> None:
    code, said = invoke(run_of(tmp_path / "a", 1.0), run_of(tmp_path / "b", 1.0))
    assert code == 0
    assert "no figure differs" in said
    assert "state at step 2: equal" in said
    assert "configuration: equal" in said
    assert "  host: a, b\n" in said
    assert said.endswith("EQUAL\n")


def test_different_runs(tmp_path: Path) -> None:
    code, said = invoke(run_of(tmp_path / "a", 1.0), run_of(tmp_path / "b", 2.0, checksum=7))
    assert code == 1
    assert "different from step 2 on:" in said
    assert ["grad_norm", "2", "1.0", "2.0", "0.5", "0.5", "2"] in [line.split() for line in said.splitlines()]
    assert "step_s" not in said
    assert "state at step 2: DIFFERENT (checksums 1 and 7)" in said
    assert "  optimizer.lr: 1.0, 2.0\n" in said
    assert said.endswith("DIFFERENT\n")


def test_long_lists_are_cut_for_people_only(tmp_path: Path) -> None:
    runs = run_of(tmp_path / "a", 1.0, layers=30), run_of(tmp_path / "b", 2.0, layers=30)
    assert "and 11 more figures" in invoke(*runs)[1]
    assert len(json.loads(invoke(*runs, "--json")[1])["fields"]) == 31


def test_a_tolerance_is_for_figures_and_leaves_the_bits_of_states_uncounted(tmp_path: Path) -> None:
    runs = run_of(tmp_path / "a", 1.0), run_of(tmp_path / "b", 1.01, checksum=7)
    code, said = invoke(*runs, "--tolerance", "0.1")
    assert code == 0
    assert "state at step 2: DIFFERENT" in said
    assert said.endswith("EQUAL within 0.1\n")
    assert invoke(*runs, "--tolerance", "0.001")[0] == 1


def test_figures_alone_or_states_alone_make_a_difference(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", 1.0)
    assert invoke(one, run_of(tmp_path / "b", 1.0, checksum=2))[0] == 1
    assert invoke(one, run_of(tmp_path / "c", 2.0))[0] == 1


def test_json_has_everything_and_no_infinity(tmp_path: Path) -> None:
    one, other = run_of(tmp_path / "a", 1.0), run_of(tmp_path / "b", 2.0, layers=2)
    code, said = invoke(one, other, "--json")
    found = json.loads(said, parse_constant=lambda name: pytest.fail(name))
    assert (code, found["equal"], found["first_step"], found["lines"]) == (1, False, 1, 2)
    fields = {field["name"]: field for field in found["fields"]}
    assert fields["expert_load_max[1]"] | {"largest_step": 0} == {
        "name": "expert_load_max[1]", "step": 1, "a": None, "b": 1.0,
        "relative": "inf", "largest": "inf", "largest_step": 0,
    }  # fmt: skip
    assert found["checkpoints"] == [{"step": 2, "equal": True, "a": 1, "b": 1}]
    assert found["configuration"] == [{"key": "optimizer.lr", "a": 1.0, "b": 2.0}]
    assert found["environment"] == [{"key": "host", "a": "a", "b": "b"}]
    assert [run["last_step"] for run in found["runs"]] == [2, 2]


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1", "some"])
def test_a_tolerance_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: str) -> None:
    """Not with 1, which says that the runs differ."""
    runs = run_of(tmp_path / "a", 1.0), run_of(tmp_path / "b", 2.0)
    monkeypatch.setattr(sys, "argv", ["rxt-dist", "diff", *runs, f"--tolerance={tolerance}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 64
