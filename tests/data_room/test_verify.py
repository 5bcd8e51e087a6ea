from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from shard_folder import random_corpus, write_folder

from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.sealing import SPARE_FILE, finish_dataset, read_spare, sealed_json
from rxt_dist.data.verify import Report, require_sound, verify_full, verify_quick
from rxt_dist.errors import DataError

_UNITS = ("u00000", "u00001")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "data"
    manifest = write_folder(root, random_corpus(31, units=2, documents=40), 32)
    (root / "clean.json").write_text('{"kept": "wszystko, każdy dokument"}\n')
    finish_dataset(root, replace(manifest, files=()), _UNITS)
    return root


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _damaged(report: Report) -> set[str]:
    return {finding.file for finding in report.findings}


def test_a_sound_dataset_is_sound(dataset: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_full(dataset, 2, lambda done, total: seen.append((done, total)))
    assert report.findings == report.unknown == ()
    assert report.files == len(_files(dataset))
    assert report.bytes == sum(p.stat().st_size for p in _files(dataset) if p.name not in ("dataset.json", SPARE_FILE))
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in dataset.rglob("*.arrow"))
    assert verify_quick(dataset).findings == ()
    require_sound(report, dataset)


@pytest.mark.slow
def test_one_flipped_bit_anywhere_is_found(dataset: Path) -> None:
    """Every file of the folder, at random places; `--quick` finds it everywhere but inside the shards."""
    rng = np.random.default_rng(5)
    kinds = set()
    for path in _files(dataset):
        kinds.add(path.suffix)
        original = path.read_bytes()
        name = path.relative_to(dataset).as_posix()
        for bit in rng.integers(8 * len(original), size=6).tolist():
            _flip(path, bit)
            assert _damaged(verify_full(dataset, 1)) == {name}, (name, bit)
            if path.suffix != ".arrow":
                assert _damaged(verify_quick(dataset)) == {name}, (name, bit)
            path.write_bytes(original)
    assert kinds == {".json", ".arrow", ".sums", ".zip"}
    assert verify_full(dataset, 1).findings == ()


@pytest.mark.slow
def test_every_byte_of_the_manifest_counts(dataset: Path) -> None:
    path = dataset / "dataset.json"
    original = path.read_bytes()
    for at in range(0, len(original), 97):
        _flip(path, 8 * at + at % 8)
        assert "dataset.json" in _damaged(verify_quick(dataset)), at
        path.write_bytes(original)


def test_missing_and_truncated_files_are_named(dataset: Path) -> None:
    gone = ["en/train/u00000-000.arrow", "pl/eval/u00001-000.sums", "tokenizer.json", "units/u00001.json", SPARE_FILE]
    for name in gone:
        (dataset / name).unlink()
    cut = dataset / "pl/train/u00000-000.arrow"
    cut.write_bytes(cut.read_bytes()[:-3])
    for report in (verify_quick(dataset), verify_full(dataset)):
        assert _damaged(report) == {*gone, "pl/train/u00000-000.arrow"}
        with pytest.raises(DataError, match=r"6 damaged files: .*tokenizer\.json is missing.*--repair"):
            require_sound(report, dataset)


def test_a_lost_manifest_is_read_from_its_copy(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    _flip(dataset / "dataset.json", 999)
    _flip(dataset / "en/train/u00000-000.arrow", 7777)
    report = verify_full(dataset)
    assert report.manifest == manifest
    assert _damaged(report) == {"dataset.json", "en/train/u00000-000.arrow"}
    (dataset / SPARE_FILE).write_bytes(b"no archive")
    report = verify_full(dataset)
    assert report.manifest is None
    assert _damaged(report) == {"dataset.json", SPARE_FILE}
    (dataset / "dataset.json").unlink()
    (dataset / SPARE_FILE).unlink()
    with pytest.raises(DataError, match="has not finished"):
        verify_full(dataset)


def test_shards_that_differ_from_what_their_offsets_say_are_found(dataset: Path) -> None:
    """Wrong offsets with right hashes: a manifest that was made wrongly, and sealed."""
    manifest = load_manifest(dataset)
    source = manifest.sources[0]
    shard = source.train.shards[0]
    batch = shard.batches[0]._replace(seg_len=shard.batches[0].seg_len + 8)
    shards = (replace(shard, batches=(batch,)), *source.train.shards[1:])
    wrong = replace(
        manifest, sources=(replace(source, train=replace(source.train, shards=shards)), *manifest.sources[1:])
    )
    (dataset / "dataset.json").write_bytes(sealed_json(wrong.to_dict()))
    found = {finding.file: finding.problem for finding in verify_full(dataset).findings}
    assert "record batches" in found[shard.file]


def test_units_that_disagree_with_the_manifest_are_found(dataset: Path) -> None:
    path = dataset / "units/u00001.json"
    content = json.loads(path.read_text())
    content["sources"][0]["train"]["shards"][0]["blake3"] = "0" * 64
    path.write_text(json.dumps(content))
    finish_dataset(dataset, load_manifest(dataset), _UNITS)
    findings = verify_quick(dataset).findings
    assert [finding.file for finding in findings] == ["units/u00001.json"]
    assert "disagree" in findings[0].problem


def test_another_tokenizer_is_found_even_where_it_was_sealed(dataset: Path) -> None:
    content = json.loads((dataset / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (dataset / "tokenizer.json").write_text(json.dumps(content))
    finish_dataset(dataset, load_manifest(dataset), _UNITS)
    assert _damaged(verify_quick(dataset)) == {"tokenizer.json"}


def test_files_that_nothing_knows_are_told_and_are_no_damage(dataset: Path) -> None:
    shutil.copy(dataset / "en/eval/u00000-000.arrow", dataset / "en/eval/u00009-000.arrow")
    (dataset / "notes.txt").write_text("mine")
    report = verify_full(dataset)
    assert report.findings == ()
    assert report.unknown == ("en/eval/u00009-000.arrow", "notes.txt")


def test_equal_files_give_an_equal_archive(sound: Path, dataset: Path) -> None:
    before = (dataset / SPARE_FILE).read_bytes()
    manifest = load_manifest(dataset)
    assert asdict(finish_dataset(dataset, replace(manifest, files=()), _UNITS)) == asdict(manifest)
    assert (dataset / SPARE_FILE).read_bytes() == before == (sound / SPARE_FILE).read_bytes()


def test_a_finished_dataset_is_not_finished_again_with_other_rows(dataset: Path) -> None:
    """A damaged unit manifest would otherwise be sealed by running the build again."""
    manifest = load_manifest(dataset)
    before = (dataset / "dataset.json").read_bytes()
    source = manifest.sources[0]
    shards = (replace(source.train.shards[0], blake3="0" * 64), *source.train.shards[1:])
    other = replace(source, train=replace(source.train, shards=shards))
    with pytest.raises(DataError, match=r"was finished with root digest .* data verify"):
        finish_dataset(dataset, replace(manifest, sources=(other, *manifest.sources[1:])), _UNITS)
    assert (dataset / "dataset.json").read_bytes() == before
    _flip(dataset / "dataset.json", 4000)
    finish_dataset(dataset, manifest, _UNITS)
    assert (dataset / "dataset.json").read_bytes() == before


@pytest.mark.slow
def test_a_damaged_archive_is_never_more_than_a_loss(dataset: Path) -> None:
    path = dataset / SPARE_FILE
    original = path.read_bytes()
    whole = read_spare(dataset)
    assert set(whole) == {"dataset.json", *(item.file for item in load_manifest(dataset).files)}
    directory = original.find(b"PK\x01\x02")
    for bit in [*range(8 * directory, 8 * len(original), 3), *range(0, 8 * directory, 9973)]:
        _flip(path, bit)
        found = read_spare(dataset)
        assert all(found.get(name) in (None, whole[name]) for name in whole), bit
        path.write_bytes(original)
    for size in range(0, len(original), 4999):
        path.write_bytes(original[:size])
        read_spare(dataset)


def test_what_lies_in_the_folder_does_not_become_part_of_the_dataset(dataset: Path) -> None:
    before = load_manifest(dataset)
    (dataset / "notes.txt").write_text("mine")
    (dataset / "figures").mkdir()
    (dataset / "figures" / "lengths.png").write_bytes(b"a picture")
    shutil.copy(dataset / "units/u00000.json", dataset / "units/u00000 (1).json")
    finished = finish_dataset(dataset, replace(before, files=()), _UNITS)
    assert finished == before
    report = verify_full(dataset)
    assert report.findings == ()
    assert report.unknown == ("figures/lengths.png", "notes.txt", "units/u00000 (1).json")


def test_what_cannot_be_read_is_not_called_missing(dataset: Path) -> None:
    """A folder of that name cannot be read by anybody, root included."""
    for name in ("clean.json", "dataset.json"):
        (dataset / name).unlink()
        (dataset / name).mkdir()
        problems = {finding.file: finding.problem for finding in verify_quick(dataset).findings}
        assert problems[name] == "cannot be read (Is a directory)"
    (dataset / SPARE_FILE).unlink()
    for look in (load_manifest, verify_quick):
        with pytest.raises(DataError, match=r"dataset\.json cannot be read \(Is a directory\)\. Mend its rights"):
            look(dataset)


def test_a_build_that_ended_between_archive_and_manifest(dataset: Path) -> None:
    """A small file changed, and no row: the archive states it, the manifest does not yet."""
    before = (dataset / "dataset.json").read_bytes()
    (dataset / "clean.json").write_text('{"kept": "wszystko"}\n')
    finished = finish_dataset(dataset, load_manifest(dataset), _UNITS)
    after = (dataset / "dataset.json").read_bytes()
    (dataset / "dataset.json").write_bytes(before)
    report = verify_full(dataset)
    assert report.manifest == finished
    assert [finding.file for finding in report.findings] == ["dataset.json"]
    assert "a build ended between the two" in report.findings[0].problem
    # Where the disk does not match the copy, the copy is not taken.
    (dataset / "clean.json").write_text("{}")
    report = verify_full(dataset)
    assert report.manifest is not None
    assert report.manifest != finished
    assert _damaged(report) == {"clean.json", SPARE_FILE}
    (dataset / "dataset.json").write_bytes(after)
    assert _damaged(verify_full(dataset)) == {"clean.json"}
