from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from kills import kill_in_the_middle

from data_prep.corpora import ReadCounts, find_files, read_file
from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.synthetic import write_sample
from data_prep.tokenizing.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.verify import verify_full
from rxt_dist.errors import ConfigError, DataError, DiskError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "texts"
    write_sample(out, 120_000)
    (out / "en" / "code.txt").write_text("List[T] and arr[A] and [PAD][BOS] [EOS]. " * 20)
    return out


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    documents = (document for file in find_files([corpus]) for document in read_file(file, ReadCounts()))
    save_tokenizer(train_tokenizer(documents, 1000), path)
    return path


@pytest.fixture
def request_(corpus: Path, tokenizer: Path, tmp_path: Path) -> BuildRequest:
    return BuildRequest((corpus,), tmp_path / "out", tokenizer, seq_len=64, workers=1, unit_bytes=20_000)


def _texts(dataset: TokenDataset, split: str) -> Counter[str]:
    """Every document of a split, decoded from its segments."""
    tokenizer = load_tokenizer(dataset.root / "tokenizer.json")
    pieces: dict[tuple[str, int], dict[int, list[int]]] = {}
    for index, source in enumerate(dataset.sources):
        row = 0
        for shard in source.split(split).shards:
            for _ in range(shard.rows):
                tokens = dataset.read(split, np.array([index]), np.array([row])).tokens_RT[0].tolist()
                at = 0
                for segment in dataset.segments(split, index, row):
                    # A document's ordinal counts within its unit, which the shard's name begins with.
                    key = (shard.file.rsplit("-", 1)[0], segment.document)
                    pieces.setdefault(key, {})[segment.offset] = tokens[at : at + segment.length]
                    at += segment.length
                row += 1
    texts = []
    for by_offset in pieces.values():
        ids = [token for offset in sorted(by_offset) for token in by_offset[offset]]
        assert (ids[0], ids[-1]) == (2, 3)
        assert min(ids[1:-1]) >= 11
        texts.append(tokenizer.decode(ids[1:-1], skip_special_tokens=False))
    return Counter(texts)


def test_every_document_stands_in_the_shards_exactly_once(request_: BuildRequest, corpus: Path) -> None:
    result = build_dataset(request_)
    dataset = TokenDataset(request_.out)
    documents = [document for file in find_files([corpus]) for document in read_file(file, ReadCounts())]
    train, held_out = _texts(dataset, "train"), _texts(dataset, "eval")
    assert train + held_out == Counter(document.text for document in documents)
    totals = result.manifest.totals
    assert totals.documents == len(documents) == result.counts.documents
    assert totals.tokens + totals.padding == totals.rows * 64
    assert totals.text_bytes == sum(len(document.text.encode()) for document in documents)
    assert totals.escaped_literals == 100
    for source in dataset.sources:
        assert source.language == source.name
        assert 0 < source.eval.totals.documents < 0.15 * source.train.totals.documents
    assert verify_full(request_.out).findings == ()
    assert not list(request_.out.rglob("*.tmp.*"))


@pytest.mark.slow
def test_workers_change_nothing(request_: BuildRequest, tmp_path: Path) -> None:
    one = build_dataset(request_)
    two = build_dataset(dataclasses.replace(request_, out=tmp_path / "two", workers=2))
    assert one.units > 3
    assert one.manifest.root_digest == two.manifest.root_digest
    assert one.counts == two.counts


def test_running_again_builds_nothing(request_: BuildRequest) -> None:
    first = build_dataset(request_)
    times = {path: path.stat().st_mtime_ns for path in request_.out.rglob("*.arrow")}
    second = build_dataset(request_)
    assert (second.units_kept, second.manifest) == (first.units, first.manifest)
    assert times == {path: path.stat().st_mtime_ns for path in request_.out.rglob("*.arrow")}


def test_a_lost_or_cut_shard_is_rebuilt(request_: BuildRequest) -> None:
    first = build_dataset(request_)
    shards = [request_.out / shard.file for shard in first.manifest.shards()]
    shards[0].unlink()
    shards[-1].write_bytes(b"cut")
    second = build_dataset(request_)
    assert first.units - 2 <= second.units_kept < first.units
    assert verify_full(request_.out).findings == ()
    assert second.manifest == first.manifest


_KILLED = """
import os, sys
from pathlib import Path
from data_prep.documents.build import BuildRequest, build_dataset
if __name__ == "__main__":
    corpus, out, tokenizer, workers = sys.argv[1:]
    paths = (Path(corpus),), Path(out), Path(tokenizer)
    build_dataset(BuildRequest(*paths, seq_len=64, workers=int(workers), unit_bytes=20_000))
"""


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "committed"), [(1, 3), (2, 1)])
def test_kill_9_in_the_middle_and_running_again_gives_the_same_digest(
    request_: BuildRequest, tmp_path: Path, workers: int, committed: int
) -> None:
    script = tmp_path / "build_it.py"
    script.write_text(_KILLED)
    clean = build_dataset(dataclasses.replace(request_, out=tmp_path / "clean"))
    arguments = [str(request_.inputs[0]), str(request_.out), str(request_.tokenizer), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    kill_in_the_middle(
        [sys.executable, str(script), *arguments],
        environment,
        request_.out,
        lambda: len(list(request_.out.glob("units/*.json"))) >= committed,
    )
    assert not (request_.out / "dataset.json").exists()
    result = build_dataset(request_)
    assert committed <= result.units_kept < result.units
    assert result.manifest.root_digest == clean.manifest.root_digest
    assert verify_full(request_.out).findings == ()


def test_a_folder_of_another_spec_is_refused_with_the_difference(request_: BuildRequest, tmp_path: Path) -> None:
    corpus = tmp_path / "texts"
    shutil.copytree(request_.inputs[0], corpus)
    request_ = dataclasses.replace(request_, inputs=(corpus,))
    build_dataset(request_)
    with pytest.raises(DataError, match="seq_len was 64 and is now 128"):
        build_dataset(dataclasses.replace(request_, seq_len=128))
    with pytest.raises(DataError, match=r"eval_fraction was 0\.02 and is now 0\.1"):
        build_dataset(dataclasses.replace(request_, eval_fraction=0.1))
    with pytest.raises(DataError, match="trained_vocab_size was None and is now 4096"):
        build_dataset(dataclasses.replace(request_, tokenizer=None))
    other = tmp_path / "other.json"
    save_tokenizer(train_tokenizer([d for f in find_files([corpus]) for d in read_file(f, ReadCounts())], 400), other)
    with pytest.raises(DataError, match="tokenizer_sha256 was"):
        build_dataset(dataclasses.replace(request_, tokenizer=other))
    (corpus / "new.txt").write_text("something new")
    (corpus / "en" / "code.txt").write_text("something else")
    with pytest.raises(DataError, match=r"\+texts/new\.txt, texts/en/code\.txt \(content\)"):
        build_dataset(request_)


def test_a_folder_with_other_things_is_left_alone(request_: BuildRequest) -> None:
    request_.out.mkdir()
    (request_.out / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        build_dataset(request_)


def test_two_builders_do_not_meet(request_: BuildRequest) -> None:
    request_.out.mkdir()
    with open(request_.out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another build is writing"):
            build_dataset(request_)
    build_dataset(request_)


def test_too_little_disk_is_refused_before_anything_is_written(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskError, match="Free some space"):
        build_dataset(request_)
    assert {path.name for path in request_.out.iterdir()} == {".lock", ".setup.lock"}


def test_an_empty_corpus_is_refused(request_: BuildRequest, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="corpus is empty: 1 files"):
        build_dataset(dataclasses.replace(request_, inputs=(tmp_path / "nothing",)))
    with pytest.raises(DataError, match="no text to train"):
        build_dataset(
            dataclasses.replace(request_, inputs=(tmp_path / "nothing",), out=tmp_path / "o2", tokenizer=None)
        )


def test_bad_input_found_by_a_worker_process_is_told(request_: BuildRequest, tmp_path: Path) -> None:
    corpus = tmp_path / "texts"
    shutil.copytree(request_.inputs[0], corpus)
    (corpus / "zz.jsonl").write_text('{"text": "fine"}\n{"te')
    with pytest.raises(DataError, match=r"zz\.jsonl, line 2 is not JSON"):
        build_dataset(dataclasses.replace(request_, inputs=(corpus,), workers=2))


@pytest.mark.parametrize("changes", [{"workers": 0}, {"eval_fraction": 1.0}, {"eval_fraction": -0.1}])
def test_impossible_requests_are_refused(request_: BuildRequest, changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(changes.values())))):
        dataclasses.replace(request_, **changes)


def test_a_small_source_still_has_a_held_out_document(tmp_path: Path, tokenizer: Path) -> None:
    for language, count in (("en", 5), ("pl", 2), ("de", 1)):
        (tmp_path / "texts" / language).mkdir(parents=True)
        for n in range(count):
            (tmp_path / "texts" / language / f"{n}.txt").write_text(f"text number {n} in {language}")
    sizes = []
    for fraction in (0.02, 0.0):
        request = BuildRequest((tmp_path / "texts",), tmp_path / f"o{fraction}", tokenizer, 64, eval_fraction=fraction)
        manifest = build_dataset(request).manifest
        sizes.append([(s.name, s.train.totals.documents, s.eval.totals.documents) for s in manifest.sources])
    assert sizes == [[("en", 4, 1), ("pl", 1, 1), ("und", 1, 0)], [("en", 5, 0), ("pl", 2, 0), ("und", 1, 0)]]


@pytest.mark.slow
def test_the_held_out_documents_do_not_depend_on_their_place(tmp_path: Path, tokenizer: Path) -> None:
    """Held out is decided by the id: other units, other neighbours, the same documents."""
    records = [json.dumps({"text": f"document {n}", "language": "en"}) + "\n" for n in range(2000)]
    held_out = []
    for unit_bytes, name in ((10_000, "a"), (10**9, "b")):
        folder = tmp_path / name / "texts"
        folder.mkdir(parents=True)
        for part in range(4):
            (folder / f"{part}.jsonl").write_text("".join(records[part * 500 : part * 500 + 500]))
        request = BuildRequest((folder,), tmp_path / f"out-{name}", tokenizer, 64, 1000, 0.05, 1, unit_bytes)
        build_dataset(request)
        held_out.append(_texts(TokenDataset(request.out), "eval"))
    assert held_out[0] == held_out[1]
    assert 60 < sum(held_out[0].values()) < 140


@pytest.mark.slow
def test_building_imports_neither_torch_nor_deepspeed(request_: BuildRequest) -> None:
    code = (
        "import sys; from pathlib import Path; from data_prep.documents.build import BuildRequest, build_dataset;"
        "import data_prep.synthetic, rxt_dist.data.sampler, data_prep.commands;"
        f"build_dataset(BuildRequest((Path({str(request_.inputs[0])!r}),), Path({str(request_.out)!r}),"
        f"Path({str(request_.tokenizer)!r}), workers=1));"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
