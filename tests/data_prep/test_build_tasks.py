"""Builds in parts: arrays of tasks, both backends, data files, cleaning, full disks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import json
import random
import re
import shutil
import threading
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from data_prep.building import builder
from data_prep.building.builder import Sharing
from data_prep.corpora import ReadCounts, find_files, read_file
from data_prep.documents import build as build_module
from data_prep.documents.build import BuildRequest, BuildResult, build_dataset
from data_prep.synthetic import write_sample
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.config.load import load_data
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.verify import verify_full
from rxt_dist.data.writer import ShardWriter
from rxt_dist.errors import ConfigError, DataError, DiskError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "texts"
    write_sample(out, 120_000)
    return out


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    documents = (document for file in find_files([corpus]) for document in read_file(file, ReadCounts()))
    save_tokenizer(train_tokenizer(documents, 1000), path)
    return path


@pytest.fixture
def request_(corpus: Path, tokenizer: Path, tmp_path: Path) -> BuildRequest:
    return BuildRequest((corpus,), tmp_path / "out", tokenizer, seq_len=64, workers=1, unit_bytes=12_000)


@pytest.fixture(scope="module")
def digest(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same build, by one process and at once."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = build_dataset(BuildRequest((corpus,), out, tokenizer, seq_len=64, workers=1, unit_bytes=12_000))
    return _digest(result)


def _digest(result: BuildResult) -> str:
    assert result.manifest is not None, result.unfinished
    return result.manifest.root_digest


def _tasks(request: BuildRequest, tasks: int) -> list[BuildResult]:
    return [build_dataset(dataclasses.replace(request, task=task, tasks=tasks)) for task in range(tasks)]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.slow
def test_any_number_of_tasks_gives_the_same_dataset(request_: BuildRequest, digest: str, tasks: int) -> None:
    *others, last = _tasks(request_, tasks)
    assert _digest(last) == digest
    assert verify_full(request_.out).findings == ()
    for task, result in enumerate(others):
        assert result.manifest is None
        left = re.fullmatch(
            r"\d+ of \d+ units are left to other tasks \((.*)\); the last one finishes it all.", result.unfinished
        )
        assert left is not None, result.unfinished
        named = [int(number) for number in left[1].split(", ")]  # those that ran before are not missing
        assert named == sorted(named)
        assert task < min(named) <= max(named) < tasks
    assert not [path for path in request_.out.rglob(".*") if path.name.endswith(".lock") and path.name[1] == "u"]


def test_the_number_of_tasks_may_change_between_runs(request_: BuildRequest, digest: str) -> None:
    assert build_dataset(dataclasses.replace(request_, task=1, tasks=3)).manifest is None
    assert build_dataset(dataclasses.replace(request_, task=4, tasks=5)).manifest is None
    finished = {path.name: path.stat().st_mtime_ns for path in request_.out.glob("units/*.json")}
    result = build_dataset(request_)
    assert _digest(result) == digest
    assert result.units_kept == len(finished) > 0
    assert {name: (request_.out / "units" / name).stat().st_mtime_ns for name in finished} == finished


def test_each_unit_has_one_task_whatever_their_number() -> None:
    units = [Unit(f"u{i:05d}", (), 1) for i in range(500)]
    assert Sharing().mine(units) == units
    for tasks in (1, 2, 3, 7, 64):
        shares = [Sharing(task=task, tasks=tasks).mine(units) for task in range(tasks)]
        assert sorted((u for share in shares for u in share), key=lambda u: u.name) == units
        assert max(map(len, shares)) < 3 * 500 / tasks + 8


def test_tasks_at_the_same_time_share_the_work(request_: BuildRequest, digest: str) -> None:
    results: list[BuildResult] = []

    def run(task: int) -> None:
        results.append(build_dataset(dataclasses.replace(request_, task=task, tasks=3)))

    threads = [threading.Thread(target=run, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert {_digest(result) for result in results if result.manifest is not None} == {digest}
    assert load_manifest(request_.out).root_digest == digest


def test_a_plain_build_and_tasks_do_not_meet(request_: BuildRequest) -> None:
    request_.out.mkdir()
    with open(request_.out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(DataError, match="Another build is writing"):
            build_dataset(request_)
        assert build_dataset(dataclasses.replace(request_, task=0, tasks=2)).manifest is None
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another build is writing"):
            build_dataset(dataclasses.replace(request_, task=0, tasks=2))


@pytest.mark.parametrize(("task", "tasks"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_tasks_are_refused(request_: BuildRequest, task: int, tasks: int) -> None:
    with pytest.raises(ConfigError, match=f"--task is {task}"):
        dataclasses.replace(request_, task=task, tasks=tasks)


def test_a_file_system_without_locks_is_said_once(
    request_: BuildRequest, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    assert _digest(build_dataset(request_, said.append)) == digest
    assert sum("knows no locks" in line for line in said) == 1


def test_units_in_any_order_give_the_same_dataset(
    request_: BuildRequest, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = builder.run_units
    rng = random.Random(3)

    def shuffled(job: object, units: list[Unit], *others: object, **more: object) -> int:
        mixed = [dataclasses.replace(unit, text_bytes=rng.randrange(1, 10**6)) for unit in units]
        return inner(job, mixed, *others, **more)  # the largest first: a random order

    monkeypatch.setattr(builder, "run_units", shuffled)
    assert _digest(build_dataset(request_)) == digest


# ---------------------------------------------------------------------------------------------------------------------
# Backends and unit manifests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken is missing")
@pytest.mark.slow
def test_both_backends_give_the_same_dataset(request_: BuildRequest, digest: str) -> None:
    said: list[str] = []
    assert _digest(build_dataset(dataclasses.replace(request_, backend="gigatoken"), said.append)) == digest
    assert any("its ids are those of tokenizers on" in line for line in said)
    spec = json.loads((request_.out / "build.json").read_text())
    assert "gigatoken" not in json.dumps(spec)
    for path in sorted((request_.out / "units").glob("*.json"))[:2]:
        assert json.loads(path.read_text())["backend"] == "gigatoken"
        path.unlink()
    # Finished by the other one.
    assert _digest(build_dataset(dataclasses.replace(request_, backend="tokenizers"))) == digest


def test_little_text_is_not_worth_the_check(request_: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    build_dataset(request_, said.append)
    assert any("so little text" in line for line in said)
    monkeypatch.setattr(build_module, "_WORTH_A_CHECK", 0)
    monkeypatch.setattr(build_module, "choose_backend", lambda wanted, file, documents: pytest.fail(str(wanted)))
    build_dataset(request_)  # nothing to do, nothing to check
    next((request_.out / "units").glob("*.json")).unlink()
    with pytest.raises(pytest.fail.Exception, match="auto"):
        build_dataset(request_)


def test_the_manifest_of_a_unit_tells_what_was_read(request_: BuildRequest, corpus: Path) -> None:
    result = build_dataset(request_)
    units = [json.loads(path.read_text()) for path in sorted((request_.out / "units").glob("*.json"))]
    assert result.manifest is not None
    assert sum(unit["totals"]["documents"] for unit in units) == result.manifest.totals.documents
    assert sum(unit["bytes"] for unit in units) == sum(shard.bytes for shard in result.manifest.shards())
    assert len({unit["documents_blake3"] for unit in units}) == len(units)
    first = [unit["documents_blake3"] for unit in units]
    other = dataclasses.replace(request_, out=request_.out.with_name("other"), seq_len=100)
    build_dataset(other)
    again = [json.loads(path.read_text()) for path in sorted((other.out / "units").glob("*.json"))]
    assert [unit["documents_blake3"] for unit in again] == first


def test_the_plan_follows_a_corpus_that_moves(request_: BuildRequest, tmp_path: Path, digest: str) -> None:
    moved = tmp_path / "elsewhere" / "texts"
    assert build_dataset(dataclasses.replace(request_, task=0, tasks=2)).manifest is None
    moved.parent.mkdir()
    shutil.copytree(request_.inputs[0], moved)
    assert _digest(build_dataset(dataclasses.replace(request_, inputs=(moved,)))) == digest
    plan = json.loads((request_.out / "plan.json").read_text())
    assert all(str(moved) in item["path"] for item in plan["inputs"])


def test_a_damaged_plan_or_tokenizer_is_refused_or_mended(request_: BuildRequest, digest: str) -> None:
    build_dataset(request_)
    content = (request_.out / "tokenizer.json").read_bytes()
    for damage in (content[:1000], b"{}", None):
        (request_.out / "tokenizer.json").unlink()
        if damage is not None:
            (request_.out / "tokenizer.json").write_bytes(damage)
        assert _digest(build_dataset(request_)) == digest
        assert (request_.out / "tokenizer.json").read_bytes() == content
    (request_.out / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        build_dataset(request_)


# ---------------------------------------------------------------------------------------------------------------------
# Data files, cleaning, duplicates
# ---------------------------------------------------------------------------------------------------------------------


def _data_file(tmp_path: Path, corpus: Path, tokenizer: Path, **build: object) -> Path:
    path = tmp_path / "data.yaml"
    content = {
        "path": str(tmp_path / "shards"),
        "seq_len": 64,
        "build": {
            "sources": [
                {"name": "english", "inputs": [str(corpus / "en")], "language": "en"},
                {"name": "polish", "inputs": [str(corpus / "pl")], "language": "pl"},
            ],
            "tokenizer": str(tokenizer),
            "unit_mb": 0.012,
            **build,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_data_file_says_all_of_it(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    file = _data_file(tmp_path, corpus, tokenizer, eval_fraction=0.1)
    request = BuildRequest.of_data(load_data(file), workers=1)
    result = build_dataset(request)
    assert result.manifest is not None
    assert [(source.name, source.language) for source in result.manifest.sources] == [
        ("english", "en"),
        ("polish", "pl"),
    ]
    totals = result.manifest.sources[0].eval.totals, result.manifest.sources[0].train.totals
    assert 0.02 < totals[0].documents / totals[1].documents < 0.25
    assert request.out == tmp_path / "shards"
    tasks = BuildRequest.of_data(load_data(file), workers=1, task=1, tasks=2)
    assert build_dataset(tasks).units_kept == result.units


@pytest.mark.parametrize(("missing", "override"), [("build", "build=null"), ("seq_len", "seq_len=null")])
def test_a_data_file_that_does_not_say_how_is_refused(
    tmp_path: Path, corpus: Path, tokenizer: Path, missing: str, override: str
) -> None:
    data = load_data(_data_file(tmp_path, corpus, tokenizer), [override])
    with pytest.raises(ConfigError, match=f"no `{missing}`"):
        BuildRequest.of_data(data)


def _with_duplicates(tmp_path: Path) -> Path:
    """Forty files of two texts each, one of them the same everywhere, another one only in some upper-case letters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        texts = ["The same text in every file.", f"Text number {i} is of its own kind, with the number {i * i}."]
        (folder / f"{i:02d}.jsonl").write_text("".join(json.dumps({"text": t, "language": "en"}) + "\n" for t in texts))
    return folder


def test_duplicates_are_dropped_once_for_any_number_of_tasks(tmp_path: Path, tokenizer: Path) -> None:
    config = BuildConfig(clean=CleanConfig(exact_duplicates=True, min_characters=10))
    request = BuildRequest(
        (_with_duplicates(tmp_path),), tmp_path / "one", tokenizer, 64, eval_fraction=0.0, workers=1,
        unit_bytes=500, config=config,
    )  # fmt: skip
    said: list[str] = []
    one = build_dataset(request, said.append)
    assert one.manifest is not None
    assert one.manifest.totals.documents == 41
    assert one.counts.documents == 80
    assert one.units > 5
    assert any(line.startswith("Surveying") for line in said)
    assert json.loads((request.out / "clean.json").read_text())["dropped"] == {"exact_duplicate": 39}
    assert list(request.out.rglob("*.survey")) == []
    request = dataclasses.replace(request, out=tmp_path / "tasks")
    first, second, third = _tasks(request, 3)
    for result, surveyed in ((first, False), (second, False)):
        assert result.manifest is None
        assert "run the same array again when all are done" in result.unfinished
        assert result.unfinished.startswith("Surveyed") != surveyed
    assert third.manifest is None
    assert "left to other tasks" in third.unfinished
    assert _digest(_tasks(request, 2)[-1]) == _digest(one)
    # A finished dataset needs no surveys, nor does a lost shard.
    lost = next(itertools.chain(request.out.rglob("*.arrow")))
    lost.unlink()
    assert _digest(build_dataset(request)) == _digest(one)
    assert lost.exists()


def test_a_kill_between_finishing_and_clearing_leaves_a_whole_dataset_and_is_tidied_by_the_next_run(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    config = BuildConfig(clean=CleanConfig(exact_duplicates=True))
    request = BuildRequest((_with_duplicates(tmp_path),), tmp_path / "out", tokenizer, 64, workers=1, config=config)
    with monkeypatch.context() as patched:
        patched.setattr(build_module, "discard_surveys", kill)
        with pytest.raises(Killed):
            build_dataset(request)
    whole = (request.out / "dataset.json").read_bytes()
    assert list(request.out.rglob("*.survey"))
    assert verify_full(request.out).findings == ()
    result = build_dataset(request)
    assert result.units_kept == result.units
    assert not list(request.out.rglob("*.survey"))
    assert (request.out / "dataset.json").read_bytes() == whole


def test_filters_without_duplicates_need_no_survey(tmp_path: Path, tokenizer: Path) -> None:
    config = BuildConfig(clean=CleanConfig(min_characters=30, normalise="nfc"))
    request = BuildRequest(
        (_with_duplicates(tmp_path),), tmp_path / "out", tokenizer, 64, workers=1, unit_bytes=500, config=config
    )
    result = build_dataset(request)
    assert result.manifest is not None
    assert result.manifest.totals.documents == 40
    assert not (request.out / "duplicates").exists()
    assert json.loads((request.out / "clean.json").read_text())["dropped"] == {"too_short": 40}
    with pytest.raises(DataError, match=r"clean was .* and is now"):
        build_dataset(dataclasses.replace(request, config=BuildConfig()))


def test_what_is_held_out_is_chosen_by_the_text_after_cleaning(tmp_path: Path, tokenizer: Path) -> None:
    """Forty texts, each composed and decomposed: equal once normalised, so never on both sides."""
    texts = [f"żółć number {number} tells a story of its own" for number in range(40)]
    path = tmp_path / "in" / "a.pl.jsonl"
    path.parent.mkdir()
    forms = [unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD")]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in forms))
    config = BuildConfig(clean=CleanConfig(normalise="nfc"))
    request = BuildRequest((path.parent,), tmp_path / "out", tokenizer, 64, eval_fraction=0.4, workers=1, config=config)
    manifest = build_dataset(request).manifest
    assert manifest is not None
    (source,) = manifest.sources
    assert source.train.totals.documents + source.eval.totals.documents == 80
    assert source.train.totals.documents % 2 == 0
    assert 0 < source.eval.totals.documents < 80
    assert manifest.totals.text_bytes == 2 * sum(len(text.encode()) for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_the_middle_loses_nothing_finished(
    request_: BuildRequest, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ShardWriter.finish
    calls = itertools.count()

    def full(writer: ShardWriter) -> object:
        if next(calls) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(writer)

    monkeypatch.setattr(ShardWriter, "finish", full)
    with pytest.raises(DiskError, match="is full"):
        build_dataset(request_)
    kept = len(list(request_.out.glob("units/*.json")))
    assert kept >= 2
    assert not [path for path in request_.out.rglob(".*") if ".tmp." in path.name]
    monkeypatch.undo()
    result = build_dataset(request_)
    assert (result.units_kept, _digest(result)) == (kept, digest)
