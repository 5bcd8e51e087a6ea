"""How long phases are, and that every command gives the same answer about one that is too short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from training_run import TinyRun, build_shards
from typer.testing import CliRunner, Result

from rxt_dist.cli import app
from rxt_dist.config.phases import BLOCK, check_phases, phase_lengths
from rxt_dist.config.run import PhaseConfig
from rxt_dist.errors import ConfigError

SEQ = 64
WHOLE, SHORT = BLOCK * SEQ, 100_000


def _phases(*lengths: int | None) -> list[PhaseConfig]:
    return [PhaseConfig(tokens=length, weights={"en": 1.0}) for length in lengths]


def test_the_last_phase_has_what_the_blocks_of_the_others_leave_it() -> None:
    assert phase_lengths(_phases(WHOLE, SHORT), None, SEQ) == [WHOLE, SHORT]
    nearly = 101 * WHOLE - 1000
    assert phase_lengths(_phases(nearly, 5 * WHOLE), None, SEQ) == [nearly, 5 * WHOLE - 1000]
    assert phase_lengths(_phases(WHOLE, None), None, SEQ) == [WHOLE, None]
    assert phase_lengths(_phases(WHOLE, None), 3 * WHOLE, SEQ) == [WHOLE, 2 * WHOLE]
    assert phase_lengths(_phases(WHOLE, WHOLE), SHORT, SEQ) == [SHORT]
    assert phase_lengths([], 5, SEQ) == []


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mixture\.0 lasts 100,000 tokens, .* would last 262,144"):
        check_phases(_phases(SHORT, SHORT), None, SEQ)
    # A run that ends within it never rounds it, and without a length of rows nothing is known of blocks.
    check_phases(_phases(SHORT, SHORT), SHORT, SEQ)
    check_phases(_phases(SHORT, SHORT), None, None)
    for phases, total, message in (
        (_phases(None, SHORT), None, "tokens is not set"),
        (_phases(WHOLE, WHOLE), 3 * WHOLE, "covers 524,288 tokens of a training of 786,432"),
    ):
        for seq_len in (None, SEQ):
            with pytest.raises(ConfigError, match=message):
                check_phases(phases, total, seq_len)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run of it, and a data file of it that says how it could be built."""
    root = tmp_path_factory.mktemp("phases")
    shards = build_shards(root)
    content = TinyRun(root, shards).content()
    content["data"] |= {"seq_len": SEQ, "max_epochs": 1000}
    content["train"]["total_tokens"] = 4 * WHOLE
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    source = {"name": "en", "inputs": [str(root / "corpus/en")], "language": "en"}
    build = {"vocab_size": 300, "sources": [source]}
    data = {"path": str(shards), "seq_len": SEQ, "max_epochs": 1000, "build": build}
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return root


def _answers(files: Path, first: int) -> dict[str, Result]:
    """What each command says of a mixture that begins with `first` tokens."""
    mixture = f"mixture=[{{tokens: {first}, weights: {{en: 1}}}}, {{tokens: {4 * WHOLE - first}, weights: {{en: 1}}}}]"
    run, data, shards = (files / name for name in ("run.yaml", "data.yaml", "shards"))
    stated = files / "stated.yaml"
    stated.write_text(data.read_text() + mixture.replace("=", ": ", 1) + "\n")
    commands = {
        "data plan": ("data", "plan", data, mixture),
        "data build": ("data", "build", data, mixture, f"path={files / f'built-{first}'}", "--workers", 1),
        "data mix": ("data", "mix", data, mixture),
        "data mix of a run": ("data", "mix", run, f"data.{mixture}"),
        "data stats": ("data", "stats", shards, "--run", stated),
        "data show": ("data", "show", shards, "--run", stated, "--position", 0),
        "plan": ("plan", run, f"data.{mixture}"),
        "train": ("train", run, "--dry-run", f"data.{mixture}"),
    }
    return {name: CliRunner().invoke(app, [str(part) for part in command]) for name, command in commands.items()}


@pytest.mark.slow
def test_every_command_gives_the_same_answer(files: Path) -> None:
    for name, result in _answers(files, WHOLE).items():
        assert result.exception is None, name
        assert "training as long as the phases" not in result.stderr, name
    answers = set()
    for name, result in _answers(files, SHORT).items():
        if name in {"data plan", "data build"}:  # in whose work the mixture decides nothing
            assert result.exception is None, name
            (line,) = (line for line in result.stderr.splitlines() if "training as long as the phases" in line)
            answers.add(line.partition("would refuse the mixture: ")[2])
        else:
            assert isinstance(result.exception, ConfigError), name
            answers.add(str(result.exception))
    (answer,) = answers
    assert answer.startswith("data.mixture.0 lasts 100,000 tokens")


def test_the_mixture_does_not_keep_a_build_from_its_end(files: Path) -> None:
    """The same shards, whatever the mixture; and a build that was begun goes on with another one."""
    mixture = f"mixture=[{{tokens: {SHORT}, weights: {{en: 1}}}}, {{weights: {{en: 1}}}}]"
    command = ["data", "build", str(files / "data.yaml"), f"path={files / 'on'}", "--workers", "1", "--json"]
    first = CliRunner().invoke(app, command)
    (files / "on/dataset.json").unlink()
    again = CliRunner().invoke(app, [*command[:3], mixture, *command[3:]])
    assert again.exception is None
    digests = [json.loads(result.stdout)["root_digest"] for result in (first, again)]
    assert digests[0] == digests[1]
