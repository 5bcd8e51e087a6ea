"""What is prepared for a GPU (tests/cuda, benchmarks/gpu.sh) runs on the CPU, so that it does not rot in between."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_wheels  # noqa: E402
from gpu_parts import steps  # noqa: E402
from gpu_parts.context import Context  # noqa: E402
from gpu_parts.device import Device, fitting  # noqa: E402
from gpu_parts.report import DONE, FAILED, SKIPPED, Report  # noqa: E402
from gpu_parts.sections import BY_NAME, SECTIONS, Section, run_section  # noqa: E402


def dry(*command: str) -> None:
    """A command that must end well, without a GPU and however busy the cores are."""
    own = {"PYTHON": sys.executable, "RXT_CUDA_TESTS": "cpu-sample", "RXT_MINUTES": "20", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | own
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_one_command(tmp_path: Path) -> None:
    """Its tests too; only a GPU counts its waits."""
    dry("bash", "benchmarks/gpu.sh", "--dry-run", str(tmp_path))
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: section["status"] for name, section in content["sections"].items()} == dict.fromkeys(BY_NAME, DONE)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}: " in page for name in BY_NAME)
    swept = content["sections"]["joint-step"]["rows"]
    assert [row["tokens/s"] for row in swept if row["rows"] == 4] == ["out of memory"] * 2
    assert content["facts"]["beta_best"]["rows"] <= 2
    summary = (tmp_path / "summary.txt").read_text()
    assert re.search(r"^\d+ passed, 1 skipped", summary, re.MULTILINE)
    assert all(f"{part}: ok" in summary for part in ("torch", "doctor", "tests/cuda", "benchmark"))


def section(run: Any, needs: int = 0, most: int = 60) -> Section:
    return Section("peaks", needs, most, run)


def test_a_section_that_fails_is_written_down_and_keeps_its_rows(tmp_path: Path) -> None:
    def run(context: Any) -> None:
        """Fails.

        In the end.
        """
        context.row(what="first", ms=1.5)
        raise ArithmeticError("no such kernel\nand more")

    assert not run_section(section(run), Report(tmp_path), Device(dry=True), time.time() + 60)
    written = Report(tmp_path).content["sections"]["peaks"]
    assert written["status"] == FAILED
    assert written["rows"] == [{"what": "first", "ms": 1.5}]
    assert written["why"].startswith("ArithmeticError: no such kernel (test_gpu_dry_run.py:")
    page = (tmp_path / "gpu.md").read_text()
    assert "## peaks: Fails\n\n**failed**: ArithmeticError" in page
    assert "| first | 1.50 |" in page


def test_a_process_that_hangs_is_ended_and_one_without_time_is_not_begun(tmp_path: Path) -> None:
    real = BY_NAME["peaks"].run
    gpu.supervise([section(real, most=0)], tmp_path, True, time.time() + 60)
    assert Report(tmp_path).content["sections"]["peaks"]["why"] == "ended after 0 s"
    gpu.supervise([section(real, needs=90)], tmp_path, True, time.time() + 60)
    assert Report(tmp_path).status("peaks") == SKIPPED


def test_a_process_that_dies_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(wait=lambda *_: -11, kill=lambda: None)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda _: process)
    gpu.supervise([section(BY_NAME["peaks"].run)], tmp_path, False, time.time() + 60)
    assert Report(tmp_path).content["sections"]["peaks"]["why"] == "its process ended with code -11"


def test_only_running_out_of_memory_is_taken_for_that() -> None:
    with fitting(Device(dry=True)) as outcome:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    assert outcome == ["out of memory"]
    with pytest.raises(RuntimeError, match="illegal"), fitting(Device(dry=True)):
        raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.slow
def test_what_does_not_fit_is_tried_with_fewer_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model, and an engine beside which the plain one fits."""

    def room(allowed: int, layers: int) -> dict[str, Any]:
        if layers > allowed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"layers": layers, "tokens/s": 1.0}

    report = Report(tmp_path)
    report.begin("joint-step", "")
    context = Context("joint-step", Device(dry=True), report, time.time() + 600)
    monkeypatch.setattr(steps, "start_group", lambda _: None)
    monkeypatch.setattr(steps, "_sweep", lambda context, layers: context.row(**room(12, layers)))
    steps.sweep(context)
    monkeypatch.setattr(steps, "_one_row", lambda context, layers, *changes: room(6 if changes else 12, layers))
    steps.zero(context, stage=3)
    rows = [
        (row.get("engine"), row["layers"], row["tokens/s"]) for row in report.content["sections"]["joint-step"]["rows"]
    ]
    assert rows == [
        (None, 21, "out of memory: the model with its optimizer"),
        (None, 12, 1.0),
        ("ZeRO 3", 21, "out of memory"),
        ("ZeRO 3", 12, "out of memory"),
        ("ZeRO 3", 6, 1.0),
        ("plain", 6, 1.0),
    ]


def test_all_sections_fit_into_eight_minutes_at_their_least() -> None:
    assert sum(one.needs for one in SECTIONS) < 6 * 60
    assert len(BY_NAME) == len(SECTIONS)


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def test_only_missing_wheels_are_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: rxt-no-such\nVersion: 1.0\n"
    wheel(
        folder,
        "rxt_no_such",
        "1.0",
        {
            "rxt_no_such.py": "ANSWER = 42\n",
            "rxt_no_such-1.0.dist-info/METADATA": metadata,
            "rxt_no_such-1.0.data/purelib/beside.py": "",
            "rxt_no_such-1.0.data/scripts/tool": "",
        },
    )
    wheel(folder, "pydantic", "0.0.1", {"pydantic.py": ""})
    assert gpu_wheels.install(folder, site) == 0
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file())
    assert found == ["beside.py", "rxt_no_such-1.0.dist-info/METADATA", "rxt_no_such.py"]
    assert "here already: pydantic" in capsys.readouterr().out


def test_what_comes_with_pydantic_is_replaced_where_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "typing_extensions", "9.0", {"typing_extensions.py": ""})
    wheel(tmp_path, "numpy", "9.0", {"numpy.py": ""})
    monkeypatch.setattr(gpu_wheels, "installed", lambda name: "" if name == "pydantic" else "4.0")
    gpu_wheels.install(tmp_path, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["typing_extensions.py"]


@pytest.mark.parametrize(("wanted", "found", "enough"), [("==0.19.8", "0.19.7", False), (">=2.9", "2.14", True)])
def test_a_version_that_the_project_refuses_is_replaced(wanted: str, found: str, enough: bool) -> None:
    assert gpu_wheels.accepts(wanted, found) is enough


def test_every_requirement_is_carried_or_named() -> None:
    """Beside torch; without wandb and datasets training runs too."""
    known = {gpu_wheels.plain(name) for name in (*gpu_wheels.CARRIED, *gpu_wheels.HEAVY)}
    assert set(gpu_wheels.requirements()) - known == {"torch", "wandb", "datasets"}
