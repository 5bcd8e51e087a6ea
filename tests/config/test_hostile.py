"""Configurations that are slips or hostile: each is refused at once, with its place, its value and what to do."""

from __future__ import annotations

import os
import random
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml

from rxt_dist.cli import main
from rxt_dist.config.load import load_data, load_run, resolved_yaml
from rxt_dist.errors import ConfigError, ExitCode

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "run/demo.yaml"
SECONDS = 2.0

# key, value as YAML, what the refusal says
VALUES = (
    ("name", "2024-13-45", "'2024-13-45' is read as a date and is none"),
    ("name", "x" * 300, "at most 200 characters"),
    ("name", '"a\\0b"', "holds a character that stands for none"),
    ("name", '"\\uD800"', "holds a character that stands for none"),
    ("name", "=", "is read as !!value and is none"),
    ("name", "!!binary aGk=", "is read as !!binary and is none"),
    ("optimizer.lr", "!foo 3", "'3' is read as !foo and is none"),
    ("optimizer.lr", "0x_", "'0x_' is read as !!int and is none"),
    ("optimizer.lr", "!!int abc", "'abc' is read as !!int and is none"),
    ("optimizer.lr", "!!float abc", "'abc' is read as !!float and is none"),
    ("optimizer.lr", '!!int ""', "'' is read as !!int and is none"),
    ("optimizer.lr", '!!int "-"', "'-' is read as !!int and is none"),
    ("optimizer.lr", '!!float ""', "'' is read as !!float and is none"),
    ("optimizer.lr", "1:" * 400 + "1.5", "is read as !!float and is none"),
    ("optimizer.lr", "!!bool abc", "'abc' is read as !!bool and is none"),
    ("optimizer.lr", "!!timestamp abc", "'abc' is read as a date and is none"),
    ("optimizer.lr", "9" * 5000, "a value has 5,000 characters"),
    ("optimizer.lr", "9" * 4000, "it should be a finite number"),
    ("optimizer.lr", "0x" + "f" * 4000, "it should be a finite number"),
    ("optimizer.lr", "1e999", "it should be a finite number"),
    ("optimizer.lr", ".nan", "it should be a finite number"),
    ("optimizer.lr", "-.inf", "it should be a finite number"),
    ("optimizer.lr", "[" * 5000, "it is nested deeper than 32 levels"),
    ("optimizer.lr", "{a: " * 5000, "it is nested deeper than 32 levels"),
    ("optimizer.lr", "[" * 5000 + "]" * 5000, "it is nested deeper than 32 levels"),
    ("optimizer.no_decay", "&a [*a]", "nested deeper than 32 levels (an anchor that holds itself?)"),
    ("optimizer", "&a {lr: *a}", "nested deeper than 32 levels (an anchor that holds itself?)"),
    ("optimizer.no_decay", "[" + ", ".join(["1"] * 5_000) + "]", "and 4,980 more mistakes"),
    ("optimizer", "{[a, b]: 1}", "a key is a list or a mapping"),
    ("optimizer", "{? &a [*a] : 1}", "a key is a list or a mapping"),
    ("optimizer", "!!set {a}", "has no meaning here"),
    ("optimizer", "{" + "k" * 300 + ": 1}", "a key has 300 characters"),
    ("train.total_tokens", "1e30", "a whole number of at most 64 bits"),
    ("train.total_tokens", "9" * 30, "a whole number of at most 64 bits"),
    ("train.total_tokens", "-" + "9" * 30, "a whole number of at most 64 bits"),
    ("train.total_tokens", ".inf", "a whole number of at most 64 bits"),
    ("seed", "9223372036854775808", "a whole number of at most 64 bits"),
    ("model.decoder.moe.experts", "1e9", "1,000,000,000 is more than any machine could work with"),
    ("model.layers", "1e7", "10,000,000 is more than any machine could work with: at most 1,024"),
    ("model.dim", "1e9", "more than any machine could work with"),
    ("model.heads", "1e9", "more than any machine could work with"),
    ("model.stm_slots", "1e9", "more than any machine could work with"),
    ("model.seq_len", "1e9", "more than any machine could work with"),
    ("model.decoder.moe.hidden", "1e12", "more than any machine could work with"),
    ("model.encoder.hidden", "1e12", "more than any machine could work with"),
    ("model.decoder.stateless_before", "[" + ", ".join(["moe"] * 5_000) + "]", "at most 1024 items"),
    ("train.micro_batch_rows", "1e9", "more than any machine could work with"),
    ("cluster.nodes", "1e9", "more than any machine could work with"),
    ("cluster.gpus_per_node", "1e9", "more than any machine could work with"),
    ("data.seq_len", "1e12", "more than any machine could work with"),
    ("data.path", "p" * 300, "of 300 bytes is too long: a file system takes 255"),
    ("data.tokenizer", "a/" + "p" * 300, "of 300 bytes is too long: a file system takes 255"),
    ("data.mixture", "[{path: " + "p" * 300 + ", by_size: true}]", "of 300 bytes is too long: a file system takes 255"),
    ("start", "{run: " + "p" * 300 + ", parts: [decoder]}", "of 300 bytes is too long: a file system takes 255"),
    ("cluster", "{nodes: 16384, gpus_per_node: 256}", "is 4,194,304 ranks, more than any machine has"),
)
# Overrides that are each well, and not together.
TOGETHER = (
    (("train.global_batch_tokens=256e12", "train.total_tokens=1e15", "train.micro_batch_rows=7"), "cannot share"),
    (("train.global_batch_tokens=9e18", "train.total_tokens=9e18", "train.micro_batch_rows=7"), "cannot share"),
    (
        ("train.global_batch_tokens=9e18", "train.total_tokens=9e18", "data.seq_len=null", "model.seq_len=1024",
         "train.ramp={start_tokens: 1, increment_tokens: 1, over_tokens: 9e18}"),
        "more than 10,000 enlargements",
    ),
    (("output=FILE",), "is a file, and nothing is written over it"),
    (("output=FILE/below/it",), "is a file, and nothing is written over it"),
    (("output=" + "ab/" * 1365,), "too long"),
    (("output=" + "y" * 300,), "too long"),
    ((".".join("a" * 5000) + "=1",), "names a key 5,000 levels deep"),
    (("name=ok", "optimizer.lr=1\x07"), "the value is not valid YAML"),
)  # fmt: skip


def exit_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rxt-dist", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def in_file(folder: Path, key: str, value: str) -> Path:
    """The demo with the value in place of what stands there."""
    content = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    for joined in ("model", "data", "cluster"):
        content[joined] = yaml.safe_load((DEMO.parent / content[joined]).read_text(encoding="utf-8"))
    *above, last = key.split(".")
    parent = content
    for part in above:
        parent = parent.setdefault(part, {})
    parent[last] = "PUT-HERE"
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False).replace("PUT-HERE", value), encoding="utf-8")
    return path


def there(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("key", "value", "said"), VALUES, ids=lambda value: value[:24])
@pytest.mark.slow
def test_a_value_is_refused_in_a_file_and_as_an_override(
    key: str,
    value: str,
    said: str,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = in_file(elsewhere, key, value)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if value[:60] in text)
    before = there(elsewhere)
    for arguments, place in (((str(path),), f"{path}:{line}: "), ((str(DEMO), f"{key}={value}"), f"override '{key}=")):
        began = time.process_time()
        assert exit_of(monkeypatch, "train", arguments[0], "--dry-run", *arguments[1:]) == ExitCode.CONFIG
        assert time.process_time() - began < SECONDS
        told = capsys.readouterr().err
        assert told.startswith(f"error: {place}")
        assert said in told
        assert len(told) < 20_000
    assert there(elsewhere) == before


@pytest.mark.parametrize(("overrides", "said"), TOGETHER, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("verb", [("train",), ("train", "--dry-run"), ("launch", "local"), ("plan",)], ids=" ".join)
@pytest.mark.slow
def test_values_are_refused_by_every_verb(
    verb: tuple[str, ...],
    overrides: tuple[str, ...],
    said: str,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (elsewhere / "FILE").write_text("mine")
    before, began = there(elsewhere), time.process_time()
    assert exit_of(monkeypatch, *verb, str(DEMO), *overrides) == ExitCode.CONFIG
    assert time.process_time() - began < SECONDS
    assert said in capsys.readouterr().err
    assert there(elsewhere) == before


@pytest.mark.parametrize(
    ("value", "said"),
    [("build.vocab_size=1e12", "65536"), ("seq_len=0x_", "is read as !!int"), ("path=2024-13-45", "read as a date")],
)
def test_data_files_are_refused_in_the_same_way(
    value: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_of(monkeypatch, "data", "plan", str(CONFIGS / "data/beta-400b.yaml"), value) == ExitCode.CONFIG
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_bomb_of_aliases_is_refused(elsewhere: Path) -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    levels += [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    path = elsewhere / "bomb.yaml"
    path.write_text("\n".join(levels))
    began = time.process_time()
    with pytest.raises(ConfigError, match="with every alias written out this is more than 200,000 characters"):
        load_run(path)
    assert time.process_time() - began < 2 * SECONDS


def test_an_alias_is_what_it_names(elsewhere: Path) -> None:
    path = in_file(elsewhere, "optimizer", "{lr: &rate 1e-3, clip: *rate}")
    assert load_run(path).optimizer.clip == 1e-3


def test_a_byte_that_is_not_utf_8_is_named_with_its_line(elsewhere: Path) -> None:
    path = elsewhere / "run.yaml"
    path.write_bytes(b"name: a\nseed: 1\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=rf"{path}:3: the byte 0xe9 is not UTF-8: save the file in UTF-8"):
        load_run(path)


def test_a_control_character_is_named_with_its_line(elsewhere: Path) -> None:
    path = elsewhere / "run.yaml"
    path.write_bytes(b"name: a\nseed: \x07\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: this is not valid YAML: special characters"):
        load_run(path)


def test_what_is_no_file_of_a_person_is_not_read(elsewhere: Path) -> None:
    os.mkfifo(elsewhere / "pipe")
    (elsewhere / "large.yaml").write_text("#" * 300_000)
    for path, said in (
        (elsewhere / "pipe", "it is no ordinary file"),
        (Path("/dev/zero"), "it is no ordinary file"),
        (elsewhere / "large.yaml", "has at most 200,000 bytes"),
        (elsewhere / ("n" * 300), "name too long"),
        (elsewhere, "it is a directory"),
    ):
        with pytest.raises(ConfigError, match="(?i)" + said):
            load_run(path)


def test_a_name_may_look_like_a_date() -> None:
    assert load_run(DEMO, ["name=2024-12-05"]).name == "2024-12-05"
    assert (
        load_run(DEMO, ["data.mixture=[{weights: {en: 1e20, pl: 100000000000000000000}}]"])
        .data.mixture[0]
        .weights["en"]
        == 1e20
    )


@pytest.mark.slow
def test_drawn_texts_end_in_a_refusal_or_a_configuration(elsewhere: Path) -> None:
    """Any mixture of pieces of YAML, and damaged copies of a real configuration."""
    rng = random.Random(10)
    pieces = (
        "a", "name", "train", ": ", ":", "- ", "\n", "\n  ", "[", "]", "{", "}", ", ", "&a ", "*a ", "!!int ", "!!set ",
        "! ", "!x ", "0x_", "1_", "1e5", "9" * 30, "2024-13-45", "'", '"', "\\", "#", "|\n", ">\n", "? ", "<<", "=",
        "~", "no", ".nan", "-.inf", "%YAML 1.2\n", "---\n", "...\n", "\t", "é", "\x07", "\ufeff", "@", "`", "1:30",
    )  # fmt: skip
    whole = resolved_yaml(load_run(DEMO))
    for draw in range(150):
        if draw % 2:
            text = "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
        else:
            at, size = rng.randrange(len(whole)), rng.randrange(0, 30)
            text = whole[:at] + "".join(rng.choices(pieces, k=rng.randrange(0, 3))) + whole[at + size :]
        path = elsewhere / "drawn.yaml"
        path.write_text(text, encoding="utf-8")
        key = rng.choice(("name", "train", "optimizer.lr", "data.mixture"))
        for load in (
            partial(load_run, path),
            partial(load_data, path),
            partial(load_run, DEMO, [f"{key}={text[:200]}"]),
        ):
            with suppress(ConfigError):
                load()
