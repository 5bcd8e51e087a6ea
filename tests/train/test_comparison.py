"""Two runs beside each other: real ones, and folders written as a run writes them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import TinyRun, build_shards

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError, DataError, ExitCode
from rxt_dist.locks import locked
from rxt_dist.ranks import Ranks
from rxt_dist.train.comparison import UNCOMPARED, compare_runs, read_run, relative_difference
from rxt_dist.train.run import train
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest


class Folder:
    """The folder of a run, written by hand: lines of steps 1 to `steps`, a checkpoint at the last one."""

    def __init__(self, path: Path, steps: int = 4, **settings: Any) -> None:
        self.run = RunDirectory(path)
        path.mkdir()
        self.run.config.write_text(
            yaml.safe_dump({"name": path.name, "seed": 1, "optimizer": {"lr": 1e-3}, **settings})
        )
        self.environment(host="one", code={"commit": "abc"})
        self.lines(
            [{"step": step, "time": "now", "ar_loss": 5.0 - step, "grad_norm": 1.0} for step in range(1, steps + 1)]
        )

    def environment(self, **values: Any) -> None:
        self.run.environment.write_text(json.dumps({"time": "now", **values}))

    def lines(self, lines: list[dict[str, Any]], end: str = "\n") -> None:
        self.run.metrics.write_text("\n".join(map(json.dumps, lines)) + end)

    def change(self, step: int, **figures: Any) -> None:
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        self.lines([line | figures if line["step"] == step else line for line in lines])

    def checkpoint(self, step: int, checksum: int, **meta: Any) -> None:
        store = CheckpointStore(self.run.checkpoints, 2)
        path = store.begin(step) / "rank-00000.safetensors"
        path.write_bytes(b"weights")
        store.commit(step, [store.record(path)], {"state_checksum": checksum, **meta})

    def resumed(self, step: int) -> None:
        self.run.events.append("resume", step=step)


@pytest.fixture
def a(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "b")


def compare(a: Folder, b: Folder, tolerance: float = 0.0) -> Any:
    return compare_runs(read_run(a.run.path), read_run(b.run.path), tolerance)


@pytest.mark.slow
def test_the_same_training_twice_is_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    """Whatever depends on the clock is left out, and nothing else."""
    shards = build_shards(tmp_path)
    records = []
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        tiny = TinyRun(tmp_path / name, shards, 2)
        config = load_run(tiny.file, [f"seed={seed}"])
        assert train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP")) == ExitCode.DONE
        records.append(read_run(tiny.directory))
    one, two, other = records
    same = compare_runs(one, two, 0.0)
    assert same.fields == []
    assert [step for step, _, _ in same.checksums] == [2]
    assert same.states_equal
    assert [key for key, _, _ in same.settings] == ["output"]
    # Within one process the packages that are seen grow with what is imported.
    assert [key for key, _, _ in same.surroundings if not key.startswith("packages.")] == []
    assert (same.lines, same.lines_of_one) == (3, (0, 0))
    written = {name for line in tiny.lines() for name in line}
    assert written >= UNCOMPARED - {"nonfinite"}
    different = compare_runs(one, other, 0.0)
    assert not different.states_equal
    assert different.fields[0].step == 1
    assert {"ar_loss", "grad_norm", "eval/en/true/ar_loss"} <= {found.name for found in different.fields}
    assert ("seed", 1, 2) in different.settings
    assert dict(one.surroundings)["data"] == dict(other.surroundings)["data"] is not None


def test_the_first_step_that_differs_and_the_largest_difference(a: Folder, b: Folder) -> None:
    b.change(2, grad_norm=1.001)
    b.change(3, grad_norm=2.0, ar_loss=2.5)
    b.change(4, grad_norm=1.5)
    norm, loss = compare(a, b).fields
    assert (norm.name, norm.step, norm.a, norm.b) == ("grad_norm", 2, 1.0, 1.001)
    assert norm.relative == pytest.approx(0.001 / 1.001)
    assert (norm.largest, norm.largest_step) == (0.5, 3)
    assert (loss.name, loss.step, loss.a, loss.b, loss.relative) == ("ar_loss", 3, 2.0, 2.5, pytest.approx(0.2))


def test_a_tolerance_passes_over_what_is_smaller(a: Folder, b: Folder) -> None:
    b.change(2, grad_norm=1.001)
    b.change(4, grad_norm=1.1)
    (found,) = compare(a, b, 1e-2).fields
    assert (found.step, found.a, found.b) == (4, 1.0, 1.1)
    assert compare(a, b, 0.1).fields == []


def test_lists_figures_that_one_has_not_and_those_that_are_no_numbers(a: Folder, b: Folder) -> None:
    a.change(1, expert_load_max=[1.0, 2.0], noise=0.5, ar_loss=None, nonfinite={"ar_loss": "nan"})
    b.change(1, expert_load_max=[1.0, 2.5], ar_loss=None, nonfinite={"ar_loss": "nan"})
    found = {one.name: one for one in compare(a, b).fields}
    assert set(found) == {"expert_load_max[1]", "noise"}
    assert (found["noise"].a, found["noise"].b, found["noise"].relative) == (0.5, None, math.inf)
    b.change(1, nonfinite={"ar_loss": "inf"})
    assert "ar_loss" in {one.name for one in compare(a, b).fields}


@pytest.mark.parametrize(
    ("a", "b", "relative"),
    [
        (1.0, 1.0, 0),
        (0.0, 0.0, 0),
        (2.0, 1.0, 0.5),
        (0.0, 1e-9, 1),
        (-1.0, 1.0, 2),
        (None, 1.0, math.inf),
        (math.nan, math.nan, 0),
        (math.nan, 1.0, math.inf),
        (math.inf, math.inf, 0),
        (math.inf, 1.0, math.inf),
    ],
)
def test_relative_differences(a: float | None, b: float | None, relative: float) -> None:
    assert relative_difference(a, b) == relative_difference(b, a) == relative


def test_evaluations_are_compared_with_evaluations(a: Folder, b: Folder) -> None:
    line = {"step": 4, "tokens": 8, "eval/en/true/ar_loss": 2.0}
    for folder, loss in ((a, 2.0), (b, 3.0)):
        lines = [json.loads(text) for text in folder.run.metrics.read_text().splitlines()]
        folder.lines([*lines, line | {"eval/en/true/ar_loss": loss}])
    (found,) = compare(a, b).fields
    assert (found.name, found.step, found.relative) == ("eval/en/true/ar_loss", 4, pytest.approx(1 / 3))


def test_only_lines_of_both_are_compared(a: Folder, tmp_path: Path) -> None:
    found = compare(a, Folder(tmp_path / "short", steps=3))
    assert (found.fields, found.lines, found.lines_of_one) == ([], 3, (1, 0))


def test_means_over_other_steps_are_not_compared(a: Folder, b: Folder) -> None:
    """B logs every second step: its losses are means of two, but its norms are those of the last step."""
    b.lines([{"step": 2, "ar_loss": 3.5, "grad_norm": 1.0}, {"step": 4, "ar_loss": 1.5, "grad_norm": 7.0}])
    found = compare(a, b)
    assert [(one.name, one.step) for one in found.fields] == [("grad_norm", 4)]
    (remark,) = found.remarks
    assert remark.startswith("2 lines are means over other steps")


def test_a_life_that_begins_between_two_lines_is_no_difference(a: Folder, b: Folder) -> None:
    lines = [{"step": step, "ar_loss": 5.0 - step} for step in (2, 4)]
    a.lines(lines)
    b.lines([lines[0], {"step": 4, "ar_loss": 0.5}])
    assert [one.name for one in compare(a, b).fields] == ["ar_loss"]
    b.resumed(3)
    assert compare(a, b).fields == []
    # The checkpoint of step 3 was lost later, and step 4 came from a life that began with step 2.
    b.resumed(2)
    assert [one.name for one in compare(a, b).fields] == ["ar_loss"]


def test_states_of_common_checkpoints(a: Folder, b: Folder) -> None:
    for folder, last in ((a, 7), (b, 8)):
        folder.checkpoint(2, 5)
        folder.checkpoint(4, last)
    found = compare(a, b)
    assert found.checksums == [(2, 5, 5), (4, 7, 8)]
    assert not found.states_equal
    (b.run.checkpoints / "step-00000004/rank-00000.safetensors").unlink()
    found = compare(a, b)
    assert (found.checksums, found.states_equal) == ([(2, 5, 5)], True)
    assert "step-00000004 is not compared: rank-00000.safetensors: missing" in found.remarks[0]


def test_several_datasets_are_compared_in_their_order(a: Folder, tmp_path: Path) -> None:
    b = Folder(tmp_path / "b")
    for folder, digests in ((a, ["x", "y"]), (b, ["x", "z"])):
        folder.checkpoint(4, 1, ranks=1, data={"dataset_digests": digests})
    assert ("data", "x y", "x z") in compare(a, b).surroundings


def test_settings_machines_ranks_and_data(a: Folder, tmp_path: Path) -> None:
    b = Folder(tmp_path / "b", optimizer={"lr": 2e-3})
    b.environment(host="two", code={"commit": "abc"}, packages={"torch": "2"})
    a.checkpoint(4, 1, ranks=1, data={"dataset_digest": "x"})
    b.checkpoint(4, 1, ranks=2, data={"dataset_digest": "y"})
    found = compare(a, b)
    assert found.settings == [("optimizer.lr", 1e-3, 2e-3)]
    assert sorted(found.surroundings) == [
        ("data", "x", "y"),
        ("host", "one", "two"),
        ("packages.torch", None, "2"),
        ("ranks", 1, 2),
    ]
    assert found.fields == []


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="is not a run directory"):
            read_run(path)


def test_a_run_that_is_being_trained(a: Folder) -> None:
    with locked(a.run.lock_file), pytest.raises(ConfigError, match="is being trained"):
        read_run(a.run.path)
    read_run(a.run.path)


def test_reading_changes_nothing(a: Folder) -> None:
    before = sorted(a.run.path.rglob("*"))
    read_run(a.run.path)
    assert sorted(a.run.path.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.resolved.yaml", "environment.json"])
@pytest.mark.parametrize("content", ["", "{", "some text"])
def test_a_damaged_file_is_named(a: Folder, name: str, content: str) -> None:
    (a.run.path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        read_run(a.run.path)


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_run_without_figures(a: Folder, content: str | None) -> None:
    if content is None:
        a.run.metrics.unlink()
    else:
        a.run.metrics.write_text(content)
    with pytest.raises(DataError, match="has no line yet"):
        read_run(a.run.path)


@pytest.mark.parametrize("torn", ['{"step": 3, "ar_l', "[]\n", '{"tokens": 1}\n', '{"step": "3"}\n', "\0\0\n"])
def test_a_torn_line_is_left_out_and_said(a: Folder, torn: str) -> None:
    a.run.metrics.write_text('{"step": 1, "ar_loss": 1.0}\n{"step": 2, "ar_loss": 1.0}\n' + torn)
    record = read_run(a.run.path)
    assert sorted(step for step, _ in record.lines) == [1, 2]
    assert record.remarks == (f"{a.run.metrics}: 1 torn lines are left out",)


def test_runs_without_a_common_step(a: Folder, b: Folder) -> None:
    b.lines([{"step": 9, "ar_loss": 1.0}])
    with pytest.raises(DataError, match="no line of the same step"):
        compare(a, b)


def test_reading_imports_no_torch() -> None:
    code = "import sys, rxt_dist.train.comparison; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_run_on_a_disk_for_reading_only_can_be_read(a: Folder) -> None:
    a.run.lock_file.touch(0o444)
    shutil.copytree(a.run.path, a.run.path.with_name("copy"))
    read_run(a.run.path.with_name("copy"))
