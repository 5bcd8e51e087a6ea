"""The profile of some steps: what is recorded, and that nothing else changes."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from training_run import STEP_TOKENS, TinyRun, build_shards
from typer.testing import CliRunner

import launch.local
from launch.commands import app as launch_app
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError, DiskError, ExitCode
from rxt_dist.ranks import Ranks
from rxt_dist.train import profile as module
from rxt_dist.train.preflight import preflight
from rxt_dist.train.profile import Recording, StepProfile, profiling, require_steps
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


class Listener:
    """A reporter that keeps what it should say."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def run_of(tmp_path: Path, shards: Path, name: str, profiled: int, *overrides: str) -> TinyRun:
    (tmp_path / name).mkdir(exist_ok=True)
    tiny = TinyRun(tmp_path / name, shards, STEPS)
    config = load_run(tiny.file, list(overrides))
    assert train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"), profiled) == ExitCode.DONE
    return tiny


def trace_of(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def recorded_steps(path: Path) -> list[int]:
    """Which steps of a life a trace spans, from 0."""
    names = {event.get("name", "") for event in trace_of(path)["traceEvents"]}
    return sorted(int(name.removeprefix("ProfilerStep#")) for name in names if name.startswith("ProfilerStep#"))


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def profile_of(tmp_path: Path, steps: int) -> tuple[StepProfile, Listener]:
    listener = Listener()
    recording = Recording(steps, tmp_path / "profile", 3, torch.device("cpu"))
    return StepProfile(recording, listener), listener  # type: ignore[arg-type]


def work(profile: StepProfile, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.after_step(step)


@pytest.mark.slow
def test_a_profiled_run_trains_as_any_other(tmp_path: Path, shards: Path) -> None:
    """Bit by bit, to the end of the run; step 3 is the first to be recorded."""
    plain = run_of(tmp_path, shards, "plain", 0)
    profiled = run_of(tmp_path, shards, "profiled", 1)
    assert profiled.curve() == plain.curve()
    assert len(plain.curve()) == STEPS
    checksums = [CheckpointStore(run.directory / "checkpoints", 2).list()[-1].meta for run in (plain, profiled)]
    assert checksums[0]["state_checksum"] == checksums[1]["state_checksum"]
    folder = profiled.directory / "profile"
    stem = "step-00000003-rank-00000"
    assert files_of(folder) == [f"{stem}.costs.txt", f"{stem}.trace.json.gz"]
    assert not (plain.directory / "profile").exists()
    assert recorded_steps(folder / f"{stem}.trace.json.gz") == [2]
    table = (folder / f"{stem}.costs.txt").read_text()
    assert table.startswith("Steps 3 to 3 of rank 0 on cpu")
    assert "aten::mm" in table
    (event,) = profiled.events("profile")
    assert (event["first"], event["last"]) == (3, 3)
    assert Path(event["path"]) == folder / f"{stem}.costs.txt"


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_a_life_that_ends_before_its_time_writes_nothing_and_says_so(tmp_path: Path, steps: int) -> None:
    """In the first step, in the one where the profiler starts, and while it records."""
    recording = Recording(5, tmp_path / "profile", 3, torch.device("cpu"))
    listener: Any = Listener()
    with profiling(recording, listener) as profile:
        assert profile is not None
        work(profile, 11, 10 + steps)
    assert files_of(tmp_path / "profile") == []
    assert listener.messages == [f"profile: not written, because this life had {steps} of the 7 steps needed"]
    assert listener.events == []


def test_it_is_written_once_and_told_in_short(tmp_path: Path) -> None:
    profile, listener = profile_of(tmp_path, 2)
    work(profile, 11, 19)
    profile.close()
    assert [(fields["first"], fields["last"]) for _, fields in listener.events] == [(13, 14)]
    assert recorded_steps(tmp_path / "profile/step-00000013-rank-00003.trace.json.gz") == [2, 3]
    assert any("aten::mm" in line and "1.0 calls a step" in line for line in listener.messages)
    assert len(listener.messages) <= 10


def test_on_a_gpu_the_short_lines_are_its_kernels() -> None:
    """Neither the operators that started them, nor annotations that span them, which would count them again."""

    class Averages(list[SimpleNamespace]):
        def table(self, **options: object) -> str:
            return str(options["sort_by"])

    def event(key: str, device: DeviceType, micros: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=device, self_device_time_total=micros, count=4, is_user_annotation=annotation
        )

    averages = Averages([
        event("aten::mm", DeviceType.CPU, 3000.0),
        event("copy", DeviceType.CUDA, 1000.0),
        event("gemm", DeviceType.CUDA, 3000.0),
        event("ProfilerStep*", DeviceType.CUDA, 9000.0, annotation=True),
    ])  # fmt: skip
    profiler: Any = SimpleNamespace(key_averages=lambda: averages)
    table, lines = module._costs(profiler, torch.device("cuda", 0), 2)
    assert table == "self_cuda_time_total"
    assert [line.split() for line in lines] == [
        ["profile:", "75.0%", "1.50", "ms", "a", "step", "2.0", "calls", "a", "step", "gemm"],
        ["profile:", "25.0%", "0.50", "ms", "a", "step", "2.0", "calls", "a", "step", "copy"],
    ]


def test_a_run_that_fails_keeps_its_error(tmp_path: Path) -> None:
    recording, listener = Recording(5, tmp_path / "profile", 0, torch.device("cpu")), Listener()

    def fail() -> None:
        with profiling(recording, listener) as profile:  # type: ignore[arg-type]
            assert profile is not None
            work(profile, 1, 4)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert files_of(tmp_path / "profile") == []


def test_a_full_disk_has_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, "write_atomic", refuse)
    profile, _ = profile_of(tmp_path, 1)
    with pytest.raises(DiskError, match="is full"):
        work(profile, 1, 3)


def test_more_steps_than_the_run_has_are_refused_before_it_begins(tmp_path: Path, shards: Path) -> None:
    tiny = TinyRun(tmp_path, shards, STEPS)
    config, stop = load_run(tiny.file, []), StopRequest(tmp_path / "STOP")
    with pytest.raises(ConfigError, match=r"--profile 3 needs 5 steps.*has only 4"):
        train(config, Ranks(0, 1, 0), stop, 3)
    assert not tiny.directory.exists()
    require_steps(config, preflight(config, 1), 2)


def test_a_run_of_one_step_is_only_refused_a_profile(tmp_path: Path, shards: Path) -> None:
    run_of(tmp_path, shards, "single", 0, f"train.total_tokens={STEP_TOKENS}")


@pytest.mark.parametrize(("option", "passed"), [([], []), (["--profile", "3"], ["--profile", "3"])])
def test_the_launcher_passes_it_to_every_rank(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], passed: list[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(launch.local, "launch", lambda wanted: commands.append(wanted.command) or 0)
    tiny = TinyRun(tmp_path, shards, STEPS)
    arguments = ["local", str(tiny.file), "--ranks", "1", "seed=2", *option]
    assert CliRunner().invoke(launch_app, arguments).exit_code == 0
    assert commands[0][commands[0].index("train") + 1 :] == [str(tiny.file), "seed=2", *passed]
