"""The sample of `data clean`: corpora in memory for its statistics, files for its agreement with a build."""

from __future__ import annotations

import bisect
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_prep.cleaning.trial as trial_module
from data_prep.cleaning.trial import Trial, try_filters
from data_prep.corpora import Document, ReadCounts
from data_prep.documents.build import CLEAN_REPORT, BuildRequest, build_dataset
from data_prep.readers.base import Input, Slice
from data_prep.units import Unit, make_plan
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig

SHORTEST = CleanConfig(min_characters=2)


class Corpus:
    """Documents (size in bytes, whether they are bad) in inputs that can be cut at bytes, at groups or not at all."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[list[int], list[tuple[int, bool]]]] = {}
        self.slices: list[Slice] = []

    def add(self, path: str, documents: list[tuple[int, bool]], groups: int = 0) -> None:
        """`groups` 0: documents begin at their bytes; else they lie in so many groups of equal number."""
        size = sum(size for size, _ in documents)
        if groups:
            begins = [index * groups // len(documents) for index in range(len(documents))]
        else:
            begins = [0]
            for length, _ in documents[:-1]:
                begins.append(begins[-1] + length)
        self.inputs[path] = begins, documents
        item = Input(path, path, 1 << 30, source="all")
        self.slices.append(Slice(item, 0, groups or size, size))

    @property
    def share(self) -> float:
        bad = [bad for _, documents in self.inputs.values() for _, bad in documents]
        return sum(bad) / len(bad)

    def read(self, part: Slice, counts: ReadCounts, choose: Callable[[], bool] | None = None) -> Iterator[Document]:
        begins, documents = self.inputs[part.input.path]
        for index in range(bisect.bisect_left(begins, part.start), bisect.bisect_left(begins, part.stop)):
            counts.documents += 1
            if choose is None or choose():
                yield Document("x" if documents[index][1] else "xx", "en", "all", f"{part.input.path}#{index}")

    def units(self) -> list[Unit]:
        return [Unit("u00000", tuple(self.slices), sum(part.text_bytes for part in self.slices))]


def random_documents(count: int, share: float, rng: random.Random) -> list[tuple[int, bool]]:
    return [(int(rng.triangular(200, 4000, 200)), rng.random() < share) for _ in range(count)]


def mixture(rng: random.Random) -> Corpus:
    corpus = Corpus()
    for number in range(600):
        corpus.add(f"{number}.txt", random_documents(1, 0.5, rng), groups=1)
    corpus.add("a.jsonl", random_documents(4000, 0.02, rng))
    corpus.add("small.jsonl", [(60, True)] * 1000)  # a fortieth of the bytes hold a seventh of the documents
    groups = [document for group in range(40) for document in random_documents(20, 0.9 * (group < 4), rng)]
    corpus.add("b.parquet", groups, groups=40)
    for number in range(20):
        corpus.add(f"{number}.jsonl.gz", random_documents(40, rng.random(), rng), groups=1)
    return corpus


def clustered(rng: random.Random) -> Corpus:
    """A twentieth of the documents is bad, all in one place, and shorter than the others."""
    corpus = Corpus()
    documents = random_documents(4000, 0.01, rng)
    corpus.add("a.jsonl", documents[:1500] + [(150, True)] * 200 + documents[1500:])
    return corpus


def by_length(rng: random.Random) -> Corpus:
    corpus = Corpus()
    corpus.add("a.jsonl", [(size, size < 700) for size, _ in sorted(random_documents(4000, 0, rng))])
    return corpus


def by_file(rng: random.Random) -> Corpus:
    corpus = Corpus()
    for number in range(100):
        corpus.add(f"{number}.parquet", random_documents(40, 1.0 * (number % 9 == 0), rng), groups=1)
    return corpus


def many_files(rng: random.Random) -> Corpus:
    corpus = Corpus()
    for number in range(3000):
        corpus.add(f"{number}.txt", [(int(rng.triangular(200, 4000, 200)), number < 150)], groups=1)
    return corpus


KINDS = (mixture, clustered, by_length, by_file, many_files)
RUNS = 40


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of many documents each, as those of a large corpus are."""
    monkeypatch.setattr(trial_module, "_PLACES", 100)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_bounds_hold_however_documents_are_mixed(
    kind: Callable[[random.Random], Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = kind(random.Random(5))
    monkeypatch.setattr(trial_module, "read_slice", corpus.read)
    units, held, shares = corpus.units(), 0, []
    for seed in range(RUNS):
        expected = try_filters(units, SHORTEST, 200_000, seed=seed).all
        assert expected is not None
        assert expected.tried < 700
        held += expected.dropped.low <= corpus.share <= expected.dropped.high
        shares.append(expected.dropped.share)
        assert expected.dropped.high - expected.dropped.low < 0.45
    assert held >= RUNS - 4
    # A ratio from few places is a little small where the bad documents are together; from many it is not.
    assert sum(shares) / RUNS == pytest.approx(corpus.share, rel=0.4)


@pytest.mark.usefixtures("coarse")
@pytest.mark.slow
def test_every_document_has_the_same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = mixture(random.Random(5))
    rng = random.Random(6)
    corpus.add("long.jsonl", [(20_000 if rng.random() < 0.2 else 100, False) for _ in range(1000)])
    length = {f"{path}#{n}": size for path, (_, found) in corpus.inputs.items() for n, (size, _) in enumerate(found)}
    tried = Counter[str]()

    def read(part: Slice, counts: ReadCounts, choose: Callable[[], bool] | None = None) -> Iterator[Document]:
        for document in corpus.read(part, counts, choose):
            tried[document.id] += 1
            yield document

    monkeypatch.setattr(trial_module, "read_slice", read)
    runs = 60
    for seed in range(runs):
        try_filters(corpus.units(), SHORTEST, 400_000, seed=seed)
    chance = 400_000 / sum(length.values())

    def kind(name: str) -> str:
        file = name.split("#")[0]
        return f"{file} {length[name] > 1000}" if file.endswith(".jsonl") else file.partition(".")[2]

    groups: dict[str, list[str]] = {}
    for name in length:
        groups.setdefault(kind(name), []).append(name)
    assert len(groups) == 8
    for group, names in groups.items():
        found = sum(tried[name] for name in names) / len(names) / runs
        assert found == pytest.approx(chance, rel=0.25), group


def test_what_was_read_is_counted_whether_it_was_tried_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = clustered(random.Random(5))
    monkeypatch.setattr(trial_module, "read_slice", corpus.read)
    trial = try_filters(corpus.units(), SHORTEST, 2_000_000)
    assert trial.all is not None
    assert trial.all.tried < 1500
    assert trial.all.documents == trial.sources["all"].documents == 4200


def test_one_seed_gives_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = mixture(random.Random(5))
    monkeypatch.setattr(trial_module, "read_slice", corpus.read)
    first, again, other = (try_filters(corpus.units(), SHORTEST, 400_000, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.all != other.all


def test_places_cover_a_slice_without_gap() -> None:
    item = Input("a", "a.jsonl", 1 << 30)
    slices = [(Slice(item, 0, 1000, 1000), 7), (Slice(item, 1000, 1001, 50), 1), (Slice(item, 1001, 1500, 99), 3)]
    found = trial_module._places(slices, list(range(11)))
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert found[-1].stop == 1500
    assert trial_module._places(slices, [2, 7, 9]) == [found[2], found[7], found[9]]


def test_what_cannot_be_cut_is_drawn_beside_others_of_its_size() -> None:
    packed = [Slice(Input(f"{n}.gz", f"{n}.jsonl.gz", 1 << 30), 0, 1, 1_000_000) for n in range(40)]
    lines = [Slice(Input(f"{n}.jsonl", f"{n}.jsonl", 1 << 30), 0, 1_000_000, 1_000_000) for n in range(40)]
    few = trial_module._draw([*packed, *lines], 10_000, random.Random(0))
    assert sorted((stratum.drawn.parts, stratum.drawn.read) for stratum in few)[0] == (40, 16)
    assert len(few) == 2
    assert [stratum.drawn.weight for stratum in few] == pytest.approx([8000, 8000])
    # A few files alone, and small ones, are all read.
    assert [s.drawn.read for s in trial_module._draw(packed[:9], 10_000, random.Random(0))] == [9]
    small = [Slice(Input(f"{n}.jsonl", f"s{n}.jsonl", 1 << 30), 0, 900, 900) for n in range(5)]
    smallest = trial_module._draw([*lines, *small], 10_000, random.Random(0))[0]
    assert smallest.drawn.read == smallest.drawn.parts
    assert {part.input.name for part in smallest.chosen} == {part.input.name for part in small}


# ---------------------------------------------------------------------------------------------------------------------
# Beside a build
# ---------------------------------------------------------------------------------------------------------------------

FILTERS = CleanConfig(min_characters=40, min_letters=0.5)


def text(rng: random.Random) -> str:
    words = " ".join(rng.choice(("heron", "river", "stone", "12345", "door")) for _ in range(rng.randrange(2, 40)))
    return f"The bird and the {words} of the house."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format, and last a small file in which most of the short documents are."""
    root, rng = tmp_path_factory.mktemp("trial") / "corpus", random.Random(3)
    (root / "pl").mkdir(parents=True)
    for number in range(60):
        (root / "pl" / f"{number}.txt").write_text(text(rng))
    lines = [json.dumps({"text": text(rng)}) + "\n" for _ in range(300)]
    (root / "b.jsonl").write_text("".join(lines[:250]))
    (root / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[250:]).encode()))
    pq.write_table(pa.table({"text": sorted(text(rng) for _ in range(200))}), root / "d.parquet", row_group_size=10)
    (root / "zz.jsonl").write_text('{"text": "Short.", "language": "en"}\n' * 400)
    return root


@pytest.fixture(scope="module")
def built(files: Path) -> dict[str, dict[str, object]]:
    """What a build of them drops, by source."""
    request = BuildRequest(
        (files,), files.parent / "out", seq_len=64, vocab_size=300, workers=1, config=BuildConfig(clean=FILTERS)
    )
    build_dataset(request)
    sources: dict[str, dict[str, object]] = json.loads((request.out / CLEAN_REPORT).read_text())["sources"]
    return sources


def _trial(files: Path, sample_bytes: int, seed: int = 0) -> Trial:
    return try_filters(make_plan(BuildConfig(), [files]).units, FILTERS, sample_bytes, seed=seed)


def test_a_corpus_within_the_sample_gives_exactly_what_a_build_drops(
    files: Path, built: dict[str, dict[str, object]]
) -> None:
    trial = _trial(files, 1_000_000)
    assert trial.whole
    assert set(trial.sources) == set(built)
    for name, expected in trial.sources.items():
        assert expected.tried == expected.documents == built[name]["documents"]
        found = {reason: round(part.share * expected.documents) for reason, part in expected.reasons.items()}
        assert found == built[name]["dropped"]
        assert expected.dropped.low == expected.dropped.high
    assert trial.all is not None
    assert trial.all.tried == 960
    assert trial.all.dropped.share > 0.4


@pytest.mark.slow
def test_a_smaller_sample_says_bounds_between_which_the_build_lies(
    files: Path, built: dict[str, dict[str, object]]
) -> None:
    truth = {name: 1 - source["kept"] / source["documents"] for name, source in built.items()}  # type: ignore[operator]
    held, bounds = 0, 0
    for sample_bytes in (2_000, 8_000):  # places of files, and documents of a corpus that is read whole
        for seed in range(10):
            trial = _trial(files, sample_bytes, seed)
            assert not trial.whole
            assert trial.all is not None
            assert 0 < trial.all.tried < 900
            for name, expected in trial.sources.items():
                held += expected.dropped.low <= truth[name] <= expected.dropped.high
                bounds += 1
    assert bounds >= 40
    assert held >= 0.9 * bounds


def test_each_language_that_has_a_folder_has_a_sample_of_its_own(files: Path) -> None:
    trial = _trial(files, 12_000)
    assert not trial.whole
    polish, english = trial.sources["pl"], trial.sources["en"]
    assert polish.tried == 60
    assert polish.dropped.low == polish.dropped.high
    assert english.dropped.low < english.dropped.high


def test_an_empty_corpus_drops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    trial = _trial(tmp_path, 1000)
    assert (trial.all, trial.sources) == (None, {})
