from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import kill_in_the_middle
from shard_folder import VOCABULARY, random_corpus, read_folder, same_documents, write_folder

from data_prep.shards import repack as module
from data_prep.shards.repack import RepackRequest, repack
from rxt_dist.data.manifest import SPLITS, load_manifest
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.verify import verify_full
from rxt_dist.errors import ConfigError, DataError, DiskError


def _request(tmp_path: Path, seq_len: int, name: str = "new", workers: int = 1) -> RepackRequest:
    return RepackRequest(tmp_path / "old", tmp_path / name, seq_len, workers=workers)


@pytest.mark.parametrize("seq_len", [16, 64, 500])
def test_the_same_documents_in_other_rows(tmp_path: Path, seq_len: int) -> None:
    corpus = random_corpus()
    old = write_folder(tmp_path / "old", corpus, 32)
    result = repack(_request(tmp_path, seq_len))
    assert same_documents(read_folder(tmp_path / "new"), corpus)
    new = result.manifest
    assert (new.seq_len, result.units, result.units_kept) == (seq_len, 3, 0)
    for before, after in zip(old.sources, new.sources, strict=True):
        for split in SPLITS:
            kept = ("documents", "tokens", "text_bytes", "escaped_literals")
            a, b = before.split(split).totals, after.split(split).totals
            assert [getattr(a, key) for key in kept] == [getattr(b, key) for key in kept]
            assert b.tokens + b.padding == b.rows * seq_len
            lengths = [len(ids) + 2 for unit in corpus.values() for ids in unit[before.name][split].values()]
            assert b.split_documents == sum(length > seq_len for length in lengths)
    assert verify_full(tmp_path / "new").findings == ()
    assert load_manifest(tmp_path / "new") == new
    assert not list((tmp_path / "new" / "units").glob(".*"))


def test_there_and_back_gives_the_same_rows(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old", random_corpus(1), 32)
    repack(_request(tmp_path, 80))
    back = repack(RepackRequest(tmp_path / "new", tmp_path / "back", 32, workers=1)).manifest
    assert same_documents(read_folder(tmp_path / "back"), read_folder(tmp_path / "old"))
    assert back.totals == old.totals


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=60),
    seq_len=st.integers(2, 90),
    new=st.integers(2, 300),
    window=st.integers(1, 70),
)
@pytest.mark.slow
def test_every_token_stands_in_the_new_rows_once(lengths: list[int], seq_len: int, new: int, window: int) -> None:
    rng = np.random.default_rng(sum(lengths))
    documents = {3 * n: rng.integers(11, VOCABULARY, length).astype(np.uint16) for n, length in enumerate(lengths)}
    corpus = {"u00000": {"en": {"train": documents, "eval": {}}}}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        write_folder(Path(folder) / "old", corpus, seq_len)
        patch.setattr(module, "WINDOW_DOCUMENTS", window)
        if new != seq_len:
            repack(RepackRequest(Path(folder) / "old", Path(folder) / "new", new, workers=1))
            del corpus["u00000"]["en"]["eval"]
            found = read_folder(Path(folder) / "new")
            assert found["u00000"]["en"]["eval"] == {}
            del found["u00000"]["en"]["eval"]
            assert same_documents(found, corpus)


def test_windows_bound_what_is_in_memory_and_change_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = random_corpus(2, units=1, documents=400)
    write_folder(tmp_path / "old", corpus, 32)
    monkeypatch.setattr(module, "WINDOW_DOCUMENTS", 50)
    monkeypatch.setattr(module, "_WINDOW_TOKENS", 1500)
    shards = load_manifest(tmp_path / "old").sources[0].train.shards
    windows = list(module.documents_by_window(tmp_path / "old", shards, 32))
    assert len(windows) > 4
    assert all(len(ordinals) <= 50 and len(tokens) < 1500 + 92 for ordinals, _, tokens in windows)
    repack(_request(tmp_path, 48))
    assert same_documents(read_folder(tmp_path / "new"), corpus)


@pytest.mark.slow
def test_workers_change_nothing_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "old", random_corpus(3, units=5), 32)
    one = repack(_request(tmp_path, 64, "one", workers=1))
    two = repack(_request(tmp_path, 64, "two", workers=2))
    assert one.manifest.root_digest == two.manifest.root_digest
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.arrow")}
    again = repack(_request(tmp_path, 64, "two", workers=2))
    assert (again.units_kept, again.manifest) == (5, two.manifest)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.arrow")}


def test_the_origin_stays_known(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old", random_corpus(4, units=1), 32)
    (tmp_path / "old" / "plan.json").write_text('{"format": "rxt-plan"}')
    finish_dataset(tmp_path / "old", old, ["u00000"])
    repack(_request(tmp_path, 64))
    first = repack(RepackRequest(tmp_path / "new", tmp_path / "third", 128, workers=1))
    origin = (tmp_path / "third" / "origin.json").read_text()
    assert '"seq_len": 32' in origin
    assert old.root_digest in (tmp_path / "new" / "build.json").read_text()
    assert load_manifest(tmp_path / "new").root_digest in (tmp_path / "third" / "build.json").read_text()
    assert {"origin.json", "plan.json"} <= {item.file for item in first.manifest.files}


_KILLED = """
import sys
from pathlib import Path
from data_prep.shards.repack import RepackRequest, repack
if __name__ == "__main__":
    repack(RepackRequest(Path(sys.argv[1]), Path(sys.argv[2]), 48, workers=int(sys.argv[3])))
"""


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "committed"), [(1, 3), (2, 2)])
def test_kill_9_in_the_middle_and_a_second_run_give_the_same_digest(
    tmp_path: Path, workers: int, committed: int
) -> None:
    write_folder(tmp_path / "old", random_corpus(5, units=30, documents=300), 32)
    clean = repack(_request(tmp_path, 48, "clean"))
    (tmp_path / "it.py").write_text(_KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    kill_in_the_middle(
        [sys.executable, str(tmp_path / "it.py"), str(tmp_path / "old"), str(tmp_path / "new"), str(workers)],
        environment,
        tmp_path / "new",
        lambda: len(list((tmp_path / "new").glob("units/*.json"))) >= committed,
    )
    assert not (tmp_path / "new" / "dataset.json").exists()
    result = repack(_request(tmp_path, 48))
    assert committed <= result.units_kept < result.units
    assert result.manifest == dataclasses.replace(clean.manifest, files=result.manifest.files)
    assert verify_full(tmp_path / "new").findings == ()


def test_damage_is_not_packed_into_new_shards(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "old", random_corpus(6, units=1), 32)
    path = tmp_path / "old" / next(manifest.shards()).file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="--repair"):
        repack(_request(tmp_path, 64))
    assert not (tmp_path / "new" / "dataset.json").exists()


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "old", random_corpus(7, units=1), 32)
    for seq_len, message in ((32, "have already"), (1, "from 2 to"), (70_000, "from 2 to")):
        with pytest.raises(ConfigError, match=message):
            repack(_request(tmp_path, seq_len))
    with pytest.raises(ConfigError, match="itself"):
        repack(_request(tmp_path, 64, "old"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        repack(_request(tmp_path, 64))
    (tmp_path / "new" / "thesis.tex").unlink()
    repack(_request(tmp_path, 64))
    with pytest.raises(DataError, match="seq_len was 64 and is now 65"):
        repack(_request(tmp_path, 65))
    with pytest.raises(DataError, match="not a dataset"):
        repack(RepackRequest(tmp_path / "none", tmp_path / "x", 64, workers=1))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(DiskError, match="repacked"):
        repack(_request(tmp_path, 128, "full"))


def test_a_document_longer_than_a_shard_row_batch_survives(tmp_path: Path) -> None:
    """One document over thousands of rows: its pieces lie in several record batches."""
    long = np.arange(11, 11 + 250, dtype=np.uint16).repeat(600)
    corpus = {"u00000": {"en": {"train": {0: long, 7: long[:5]}, "eval": {3: long[:3]}}}}
    write_folder(tmp_path / "old", corpus, 16)
    repack(_request(tmp_path, 1000))
    assert same_documents(read_folder(tmp_path / "new"), corpus)


def test_a_copy_of_a_unit_file_is_no_unit(tmp_path: Path) -> None:
    corpus = random_corpus(8, units=2)
    old = write_folder(tmp_path / "old", corpus, 32)
    units = tmp_path / "old" / "units"
    shutil.copy(units / "u00000.json", units / "u00000 (1).json")
    new = repack(_request(tmp_path, 64))
    assert (new.units, new.manifest.totals.tokens) == (2, old.totals.tokens)
    assert same_documents(read_folder(tmp_path / "new"), corpus)
    # Also where the manifest was made to vouch for the copy.
    finish_dataset(tmp_path / "old", old, ["u00000", "u00000 (1)", "u00001"])
    with pytest.raises(DataError, match=r"en/train came out with .* units/\*\.json are not those"):
        repack(_request(tmp_path, 64, "doubled"))
    assert not (tmp_path / "doubled" / "dataset.json").exists()


def test_a_dataset_is_not_put_into_another(tmp_path: Path) -> None:
    write_folder(tmp_path / "all" / "old", random_corpus(9, units=1), 32)
    (tmp_path / "link").symlink_to(tmp_path / "all" / "old")
    for out, where in (
        ("all/old/new", "inside"),
        ("all/old/units/new", "inside"),
        ("all", "around"),
        ("link/x", "inside"),
    ):
        with pytest.raises(ConfigError, match=rf"a folder {where} the dataset"):
            repack(RepackRequest(tmp_path / "all" / "old", tmp_path / out, 64, workers=1))
    assert not (tmp_path / "all" / "build.json").exists()
    assert verify_full(tmp_path / "all" / "old").unknown == ()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "old", random_corpus(9, units=1), 32)
    (tmp_path / "new" / ".lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"new/\.lock cannot be read or written \(Is a directory\)"):
        repack(_request(tmp_path, 64))
