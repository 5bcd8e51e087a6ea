from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_folder import random_corpus, write_folder

from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.shards.repack import RepackRequest, repack
from data_prep.shards.repair import Repaired, repair
from data_prep.shards.trace import documents_of, stored_unit, verify_deep
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.sealing import SPARE_FILE
from rxt_dist.data.verify import Report, verify_full
from rxt_dist.errors import ConfigError, DataError

_CLEAN = CleanConfig(normalise="nfc", min_characters=5, exact_duplicates=True)


def _write_corpus(folder: Path) -> None:
    rng = np.random.default_rng(3)
    words = [
        "river",
        "stone",
        "zażółć",
        "gęślą",
        "jaźń",
        "List[T]",
        "walks",
        "the",
        "of",
        "light",
        "e\u0301clair",
        "się",
    ]
    folder.mkdir()
    for part in range(4):
        texts = [" ".join(rng.choice(words, rng.integers(1, 120))) for _ in range(40)]
        texts[7] = texts[3]
        lines = [json.dumps({"text": text, "language": ("en", "pl")[n % 2]}) for n, text in enumerate(texts)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a cleaned and de-duplicated dataset of it in several units."""
    root = tmp_path_factory.mktemp("world")
    _write_corpus(root / "corpus")
    request = BuildRequest((root / "corpus",), root / "data", seq_len=64, vocab_size=400, workers=1,
                           unit_bytes=15_000, config=BuildConfig(clean=_CLEAN))  # fmt: skip
    result = build_dataset(request)
    assert result.units >= 3
    return root


@pytest.fixture
def dataset(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "data", tmp_path / "data"))


@pytest.fixture
def contents(dataset: Path) -> dict[str, bytes]:
    return _contents(dataset)


def _contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _mend(dataset: Path) -> Repaired:
    return repair(dataset, verify_full(dataset, 1))


def _damaged(report: Report) -> set[str]:
    return {finding.file for finding in report.findings}


@pytest.mark.slow
def test_one_flipped_bit_anywhere_is_found_and_mended_bit_by_bit(dataset: Path, contents: dict[str, bytes]) -> None:
    rng = np.random.default_rng(8)
    digest = load_manifest(dataset).root_digest
    assert {"build.json", "plan.json", "tokenizer.json", "clean.json", SPARE_FILE} <= contents.keys()
    assert any(name.startswith("duplicates/") for name in contents)
    for name, content in contents.items():
        for bit in rng.integers(8 * len(content), size=2).tolist():
            _flip(dataset / name, bit)
            report = verify_full(dataset, 1)
            assert _damaged(report) == {name}, (name, bit)
            mended = repair(dataset, report)
            assert mended.failed == (), (name, bit, mended)
            # A rebuilt unit brings the checksums of its shards with them.
            with_sums = {name, name.replace(".arrow", ".sums")}
            assert set(mended.restored) == with_sums, (name, bit, mended)
            assert (dataset / name).read_bytes() == content, (name, bit)
    assert _contents(dataset) == contents
    assert load_manifest(dataset).root_digest == digest
    assert verify_full(dataset, 1).findings == ()


def test_many_damaged_files_at_once(dataset: Path, contents: dict[str, bytes]) -> None:
    for name in contents:
        if name == SPARE_FILE:
            continue
        if name.endswith(".sums"):
            (dataset / name).unlink()
        elif name.endswith(".arrow"):
            (dataset / name).write_bytes(b"short")
        else:
            _flip(dataset / name, 100)
    seen: list[str] = []
    mended = repair(dataset, verify_full(dataset, 1), seen.append)
    assert mended.failed == ()
    assert _contents(dataset) == contents
    assert len(seen) == len(list((dataset / "units").glob("*.json")))
    assert not (dataset / ".repair").exists()


def test_sums_come_back_without_the_texts(dataset: Path, contents: dict[str, bytes], world: Path) -> None:
    (world / "corpus").rename(world / "away")
    try:
        for path in dataset.rglob("*.sums"):
            _flip(path, 17)
        assert _mend(dataset).failed == ()
        assert _contents(dataset) == contents
    finally:
        (world / "away").rename(world / "corpus")


def test_what_cannot_be_mended_is_named_and_left_as_it_is(
    dataset: Path, contents: dict[str, bytes], world: Path
) -> None:
    shard = next(name for name in contents if name.endswith("train/u00000-000.arrow"))
    _flip(dataset / shard, 5000)
    _flip(dataset / "tokenizer.json", 999)
    before = (dataset / shard).read_bytes()
    source = world / "corpus" / "0.jsonl"
    text = source.read_text()
    (world / "corpus").rename(world / "away")
    gone = _mend(dataset)
    (world / "away").rename(world / "corpus")
    source.write_text(text.replace("river", "rivex"))
    changed = _mend(dataset)
    source.write_text(text)
    assert "tokenizer.json" in gone.restored
    assert [finding.file for finding in gone.failed] == [finding.file for finding in changed.failed] == [shard]
    assert "is gone" in gone.failed[0].problem
    assert "has changed since the build" in changed.failed[0].problem
    assert (dataset / shard).read_bytes() == before
    assert _mend(dataset).failed == ()
    assert _contents(dataset) == contents


def test_a_unit_that_comes_out_differently_replaces_nothing(
    dataset: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = next(name for name in contents if name.endswith("train/u00000-000.arrow"))
    _flip(dataset / shard, 5000)
    before = _contents(dataset)
    monkeypatch.setattr("data_prep.shards.repair.clean_settings", lambda dataset: CleanConfig(min_characters=300))
    mended = _mend(dataset)
    assert [finding.file for finding in mended.failed] == [shard]
    assert "came out differently: either the inputs or filters" in mended.failed[0].problem
    assert "library" in mended.failed[0].problem
    assert _contents(dataset) == before


def test_both_copies_of_the_manifest_lost(dataset: Path) -> None:
    _flip(dataset / "dataset.json", 300)
    (dataset / SPARE_FILE).unlink()
    with pytest.raises(DataError, match=r"both damaged.*same `rxt-dist data build`"):
        _mend(dataset)


def test_repacked_shards_are_packed_again(dataset: Path, tmp_path: Path) -> None:
    repack(RepackRequest(dataset, tmp_path / "new", 200, workers=1))
    contents = _contents(tmp_path / "new")
    shard = next(name for name in contents if name.endswith(".arrow"))
    _flip(tmp_path / "new" / shard, 4321)
    assert _mend(tmp_path / "new").failed == ()
    assert _contents(tmp_path / "new") == contents
    (tmp_path / "new" / shard).unlink()
    dataset.rename(tmp_path / "elsewhere")
    assert "is gone" in _mend(tmp_path / "new").failed[0].problem


def test_data_that_was_not_built_from_text_is_said_to_be_so(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path, random_corpus(41, units=1, documents=20), 32)
    _flip(tmp_path / next(manifest.shards()).file, 4000)
    (failed,) = _mend(tmp_path).failed
    assert "not built from text" in failed.problem


def test_a_build_that_ended_before_the_last_file_is_taken_to_its_end(dataset: Path, world: Path) -> None:
    """The texts lie elsewhere now: the same build writes another plan and the same rows."""
    before = (dataset / "dataset.json").read_bytes()
    shutil.copytree(world / "corpus", dataset.parent / "corpus")
    request = BuildRequest((dataset.parent / "corpus",), dataset, seq_len=64, vocab_size=400, workers=1,
                           unit_bytes=15_000, config=BuildConfig(clean=_CLEAN))  # fmt: skip
    build_dataset(request)
    after = _contents(dataset)
    assert after["dataset.json"] != before
    (dataset / "dataset.json").write_bytes(before)
    mended = _mend(dataset)
    assert (mended.restored, mended.failed) == (("dataset.json",), ())
    assert _contents(dataset) == after
    assert verify_full(dataset, 1).findings == verify_full(dataset, 1).unknown == ()


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(dataset: Path) -> None:
    _flip(dataset / "tokenizer.json", 999)
    (dataset / ".lock").unlink(missing_ok=True)
    (dataset / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"\.lock cannot be read or written \(Is a directory\)"):
        _mend(dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


def test_random_documents_are_what_their_texts_give(world: Path, dataset: Path, tmp_path: Path) -> None:
    manifest = load_manifest(dataset)
    found = verify_deep(dataset, manifest, 60, 1)
    assert (found.asked, found.documents, found.untraced_documents) == (60, 60, 0)
    assert found.mismatches == found.untraced == ()
    assert found.tokens > 30 * found.documents
    assert verify_deep(dataset, manifest, 60, 1) == found != verify_deep(dataset, manifest, 60, 2)
    new = repack(RepackRequest(dataset, tmp_path / "new", 100, workers=1)).manifest
    found = verify_deep(tmp_path / "new", new, 20, 0)
    assert (found.documents, found.mismatches, found.untraced) == (20, (), ())


@pytest.mark.parametrize("seq_len", [16, 4096])
@pytest.mark.slow
def test_as_many_documents_are_traced_as_asked_for_or_all(world: Path, tmp_path: Path, seq_len: int) -> None:
    """Also where each lies in many rows, or many in one."""
    manifest = repack(RepackRequest(world / "data", tmp_path / "new", seq_len, workers=1)).manifest
    there = manifest.totals.documents
    for asked in (1, there // 2, there - 1, there, there + 50):
        found = verify_deep(tmp_path / "new", manifest, asked, 3)
        assert found.untraced == ()
        assert (found.asked, found.documents, found.mismatches) == (asked, min(asked, there), ())
    assert found.tokens == manifest.totals.tokens


def test_a_document_that_differs_is_found(dataset: Path) -> None:
    """With right hashes all around: settings under which the texts give other tokens."""
    manifest = load_manifest(dataset)
    spec = json.loads((dataset / "build.json").read_text())
    spec["clean"] |= {"normalise": "none", "min_characters": 40}
    (dataset / "build.json").write_text(json.dumps(spec))
    found = verify_deep(dataset, manifest, 200, 1)
    problems = {item.problem.split(" (")[0].split(" from")[0] for item in found.mismatches}
    assert problems == {"is dropped now", "differs"}
    assert all(item.id for item in found.mismatches)


def test_a_damaged_shard_is_blamed_and_not_its_texts(dataset: Path) -> None:
    """Also where the damage is in what checksums of rows do not cover."""
    manifest = load_manifest(dataset)
    shard = next(shard for shard in manifest.shards() if shard.rows > 5)
    seen: list[tuple[int, int]] = []
    verify_deep(dataset, manifest, 200, 1, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > seen[0][0]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    _flip(dataset / shard.file, 8 * shard.batches[0].seg_doc)
    with pytest.raises(DataError, match=rf"{shard.file} does not have the content .*--repair"):
        verify_deep(dataset, manifest, 200, 1)


def test_texts_that_are_gone_or_changed_are_said_to_be_so(dataset: Path, world: Path) -> None:
    manifest = load_manifest(dataset)
    source = world / "corpus" / "1.jsonl"
    text = source.read_text()
    try:
        source.write_text(text + " ")
        assert any("1.jsonl has changed" in problem for _, problem in verify_deep(dataset, manifest, 99, 1).untraced)
        source.unlink()
        found = verify_deep(dataset, manifest, 99, 1)
        assert any("1.jsonl is gone" in problem for _, problem in found.untraced)
        assert found.documents > 0
        assert found.documents + found.untraced_documents == 99
    finally:
        source.write_text(text)


def test_a_document_is_traced_to_its_record(dataset: Path) -> None:
    unit = stored_unit(dataset, "u00001")
    assert unit is not None
    found = documents_of(dataset, "u00001", [0, 3])
    assert list(found) == [0, 3]
    assert found[3].id.startswith("corpus/")
    assert stored_unit(dataset, "u99999") is None
    with pytest.raises(DataError, match="no plan that knows it"):
        documents_of(dataset, "u99999", [0])
