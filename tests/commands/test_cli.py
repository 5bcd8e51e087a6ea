"""The command line: quick help, exit codes, and one paragraph for every mistake."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from rxt_dist import cli
from rxt_dist.cli import main
from rxt_dist.errors import ConfigError, DataError, ExitCode
from rxt_dist.lives import Life

ROOT = Path(__file__).parents[2]
DEMO = "configs/run/demo.yaml"
NANO_CHAIN = "configs/chain/rxt-alpha-nano.yaml"

HELP_OF_ALL = """
import sys
from rxt_dist.cli import main
for verb in ("", "train", "plan", "doctor", "data", "checkpoint", "diff", "config show", "launch local", "pipeline"):
    sys.argv = ["rxt-dist", *verb.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, verb
heavy = {"torch", "deepspeed", "pyarrow", "datasets", "numpy", "tokenizers", "wandb"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rxt-dist", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.slow
def test_help_of_every_verb_imports_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", HELP_OF_ALL], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", DEMO, "--dry-run", "train.totl_tokens=1"], "Did you mean 'train.total_tokens'?"),
        (["train", "configs/run/dem.yaml"], "there is no file configs/run/dem.yaml. Did you mean 'demo.yaml'?"),
        (["train", "configs/model/demo.yaml"], "unknown key 'dim'. Did you mean 'model.dim'?"),
        (["train", DEMO, "--dry-run", "parallel.expert_parallel=3"], "use 1, 2, 4, 8 or 16"),
        (["train", DEMO, "--dry-run", "nonsense"], "an override has the form a.b=value"),
        (["plan", DEMO, "train.micro_batch_rows=3"], "2 ranks cannot share in micro-batches of 3 rows"),
        (["plan", "README"], "there is no file README"),
        (
            ["launch", "local", DEMO, "--ranks", "3", "parallel.expert_parallel=2"],
            "expert_parallel 2 does not divide 3 ranks: use 1, or",
        ),
        (["config", "show", "tests"], "there is no file tests/config.resolved.yaml"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_64(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 64
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [(errno.ENOSPC, 74, "is full (No space left on device)"), (errno.EROFS, 64, "(Read-only file system)")],
)
@pytest.mark.parametrize("verb", ["sample", "tokenizer"])
def test_a_disk_that_refuses_in_the_middle_has_its_exit_code(
    verb: str,
    code: int,
    exit_code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("some text")

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    arguments = {"sample": [str(tmp_path / "out")], "tokenizer": [str(tmp_path), "--out", str(tmp_path / "out.json")]}
    monkeypatch.setattr(os, "replace", refuse)
    assert run(monkeypatch, "data", verb, *arguments[verb]) == exit_code
    captured = capsys.readouterr()
    assert f"error: The disk of {tmp_path / 'out'}" in captured.err or f"error: {tmp_path / 'out'}" in captured.err
    assert said in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("refused", "speaks"), [(True, True), (False, False)])
def test_what_only_one_rank_may_have_met_is_said_by_whichever_it_is(
    refused: bool, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A configuration that all ranks refuse is told by rank 0 alone."""

    def refuse() -> None:
        try:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")
        except PermissionError as error:
            raise ConfigError("no") from (error if refused else None)

    monkeypatch.setattr(cli, "app", refuse)
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch) == 64
    assert ("error: no" in capsys.readouterr().err) is speaks


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_an_error_that_all_ranks_end_with_is_said_by_one(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        error = DataError("damaged")
        error.common = True
        raise error

    monkeypatch.setattr(cli, "app", refuse)
    monkeypatch.setenv("RANK", rank)
    assert run(monkeypatch) == 65
    assert capsys.readouterr().err.count("error: damaged") == said


@pytest.mark.parametrize(
    ("error", "code", "left"),
    [(ConfigError("no"), 64, "error: no\n"), (ZeroDivisionError("a slip"), 1, "ZeroDivisionError: a slip\n")],
)
def test_a_launchers_rank_leaves_its_last_words_to_the_launcher(
    error: Exception,
    code: int,
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    life = Life("a", 0.0, last_words=tmp_path / "words")
    for name, value in life.environment().items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch) == code
    assert (tmp_path / "words").read_text().endswith(left)
    assert capsys.readouterr().err == ""
    # The launcher's folder is gone: then it is said all the same.
    monkeypatch.setenv("RXT_LAST_WORDS", str(tmp_path / "gone/words"))
    if code == 64:
        assert run(monkeypatch) == code
        assert capsys.readouterr().err == left


def test_outside_of_data_a_disk_that_fails_for_a_moment_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher starts a training again after one, as it would not after code 74."""

    def stale() -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "rows")

    monkeypatch.setattr(cli, "app", stale)
    with pytest.raises(OSError, match="Stale"):
        main()


def test_two_folders_within_each_other_are_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for other in (tmp_path / "new", tmp_path / "new/chats"):
        assert run(monkeypatch, "data", "sample", str(tmp_path / "new"), "--interactions", str(other)) == 64
        assert "lie within each other" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_an_error_of_the_system_that_may_be_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def vanish(*arguments: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x")

    monkeypatch.setattr(os, "replace", vanish)
    monkeypatch.setattr(sys, "argv", ["rxt-dist", "data", "sample", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", DEMO, "--no-such-option"],
        ["train", DEMO, "--profile", "0"],
        ["launch", "local", DEMO, "--ranks", "0"],
        ["launch", "local", DEMO, "--profile", "some"],
        ["pipeline", NANO_CHAIN, "--ranks", "0"],
        ["pipeline", NANO_CHAIN, "--time-limit", "soon"],
        ["pipeline", "configs/chain/none.yaml"],
    ],
)
def test_a_wrong_command_line_has_the_same_exit_code(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *arguments) == 64


def test_a_dry_run_prints_what_would_be_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", DEMO, "--dry-run", "optimizer.lr=1e-3") == 0
    assert "  lr: 0.001\n" in capsys.readouterr().out
    assert run(monkeypatch, "train", DEMO, "--dry-run", "parallel.engine=plain", "parallel.zero=0") == 0, "one process"


def test_config_shows_a_run_file_and_a_run_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "config", "show", DEMO, "name=other") == 0
    shown = capsys.readouterr().out
    (tmp_path / "config.resolved.yaml").write_text(shown, encoding="utf-8")
    assert run(monkeypatch, "config", "show", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "other"


def test_plan_for_another_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose values an override may change; 64 GPUs and all settings in less than two seconds of processor time."""
    other = ("--cluster", "configs/cluster/h100-8x8.yaml")
    began = time.process_time()
    assert run(monkeypatch, "plan", "configs/run/rxt-beta.yaml", *other, "cluster.gpu_hour_price=4", "--json") == 0
    assert time.process_time() - began < 2
    result = json.loads(capsys.readouterr().out)
    assert (result["cluster"], result["batch"]["ranks"]) == ("h100-8x8", 64)
    assert result["cost"]["usd_estimate"] == pytest.approx(4 * result["cost"]["gpu_hours_estimate"])
    assert run(monkeypatch, "plan", "configs/model/demo.yaml", *other) == ExitCode.CONFIG
    assert "a model, which has no cluster: leave --cluster out" in capsys.readouterr().err
    assert run(monkeypatch, "plan", DEMO, "--cluster", "configs/cluster/none.yaml") == ExitCode.CONFIG
    assert "configs/cluster/none.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_adds_the_links_of_a_chain_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", NANO_CHAIN, "--json", "joint.train.total_tokens=2e9") == 0
    result = json.loads(capsys.readouterr().out)
    assert [link["link"] for link in result["links"]] == ["joint", "sft", "memory", "smat"]
    assert result["total"]["tokens"] == sum(link["tokens"] for link in result["links"])
    assert result["links"][0]["tokens"] == 2 * 10**9
    assert result["total"]["days_estimate"] > max(link["days_estimate"] for link in result["links"])
    assert run(monkeypatch, "plan", NANO_CHAIN) == 0
    assert "chain rxt-alpha-nano-chain" in capsys.readouterr().out
    assert run(monkeypatch, "plan", NANO_CHAIN, "sft.start={fresh: [memory_attention]}") == ExitCode.CONFIG


@pytest.mark.slow
def test_a_chain_is_refused_with_the_name_of_its_link(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By a process of its own; its data is not here, so that the first link is refused."""
    output = f"output={tmp_path}/runs"
    assert run(monkeypatch, "pipeline", NANO_CHAIN, "--dry-run", output) == ExitCode.DATA
    said = capsys.readouterr().err
    assert said.startswith("error: link 'joint': data/rxt-alpha-nano is not a dataset")
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_status_of_a_chain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = f"output={tmp_path}/runs"
    assert run(monkeypatch, "pipeline", NANO_CHAIN, "--status", output) == 0
    assert capsys.readouterr().out.splitlines()[3] == "smat    waiting   smat"
    assert run(monkeypatch, "pipeline", NANO_CHAIN, "--status", "--json", output) == 0
    assert [link["state"] for link in json.loads(capsys.readouterr().out)] == ["waiting"] * 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", [("train",), ("launch", "local")])
def test_a_chain_is_no_run(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *verb, NANO_CHAIN) == ExitCode.CONFIG
    assert "is a chain of runs: use `rxt-dist pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("file", [DEMO, "configs/run/rxt-beta.yaml", "configs/model/rxt-alpha-mini.yaml"])
@pytest.mark.slow
def test_plan_prints_tables_and_json(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", file) == 0
    printed = capsys.readouterr().out
    assert "Parameters of" in printed
    assert run(monkeypatch, "plan", file, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    parameters = result["parameters"]
    if "run" in result:
        settings = result["settings"]
        assert f"*{settings['own_rank']}" in printed.split()
        assert settings["verdict"] in " ".join(printed.split())
        assert f"{result['cost']['gpu_hours_estimate']:,.0f} GPU-hours" in " ".join(printed.split())
    assert list(parameters) == ["decoder", "encoder", "mlm_head", "memory_attention", "system"]
    assert all(set(count) == {"total", "active"} for count in parameters.values())


def test_the_command_ends_as_the_module_does() -> None:
    """Ranks are started by either; what is installed may be older than the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["rxt-dist"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.program
