"""What a build will come to, before it is started: units, tokens, rows, shards, disk, core-hours.

Sizes are those of the inputs where they lie ready, else those that the data file gives as published. What a byte of
text comes to in tokens, and a core to in tokens a second, are assumptions that `measure` replaces by a trial.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.building.builder import task_of
from data_prep.building.encode import choose_backend
from data_prep.building.folder import UNITS_FOLDER, finished_unit
from data_prep.corpora import Document, ReadCounts, find_files, read_unit
from data_prep.documents.unit import DocumentWork
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import Plan, Unit, make_plan, unit_bytes
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig, SourceConfig
from rxt_dist.config.run import DataConfig
from rxt_dist.data.manifest import TOKENIZER_FILE, SourceInfo, Totals, tokenizer_fingerprint
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.writer import SHARD_ROWS, ShardSpec
from rxt_dist.errors import ConfigError, DataError

# Bytes of web text a token of a bilingual vocabulary of 65,536: an assumption, to be replaced by `measure`.
BYTES_PER_TOKEN = {"en": 4.5, "pl": 4.0}
_OTHER_BYTES_PER_TOKEN = 4.0
# Million tokens a second and core, from text to hashed shards with a build's start (docs/benchmarks.md, "Data").
RATES = {"gigatoken": 7.2, "tokenizers": 0.97}

_PADDING = 0.002
_SEGMENT_BYTES, _ROW_BYTES = 10, 32  # per document piece; per row beside its tokens, its checksum included
_SAMPLE_UNITS, _SAMPLE_DOCUMENTS = 8, 200
_TRIAL_BYTES = 20_000_000


@dataclass(frozen=True)
class Assumptions:
    """What is assumed: bytes of text a token in each language, and million tokens a second of one core."""

    rate: float
    bytes_per_token: dict[str, float] = field(default_factory=lambda: dict(BYTES_PER_TOKEN))

    def tokens(self, text_bytes: int, languages: dict[str, float]) -> float:
        """Tokens in a text whose parts of each language are given as shares."""
        return sum(
            text_bytes * share / self.bytes_per_token.get(language, _OTHER_BYTES_PER_TOKEN)
            for language, share in languages.items()
        )


@dataclass(frozen=True)
class SourceCost:
    """What one source comes to. `origin` says whether its size is "inputs" or "published"."""

    name: str
    language: str
    origin: str
    text_bytes: int
    documents: int
    tokens: int
    rows: int
    train_rows: int
    units: int
    shards: int
    disk_bytes: int
    core_hours: float

    def __add__(self, other: SourceCost) -> SourceCost:
        origin = self.origin if self.origin == other.origin else "both"
        names = (
            "text_bytes",
            "documents",
            "tokens",
            "rows",
            "train_rows",
            "units",
            "shards",
            "disk_bytes",
            "core_hours",
        )
        return SourceCost("all", "", origin, *(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class BuildCost:
    """All sources, their sum, and the units of the largest task of an array of `tasks`."""

    sources: tuple[SourceCost, ...]
    total: SourceCost
    tasks: int
    largest_task_units: int
    notes: tuple[str, ...]

    def hours(self, workers: int) -> float:
        """Until the last task ends, with `workers` processes in each."""
        rounds = math.ceil(self.largest_task_units / workers)
        return rounds * self.total.core_hours / max(self.total.units, 1)


@dataclass(frozen=True)
class _Size:
    """A source's text, before any assumption."""

    source: SourceConfig
    origin: str
    text_bytes: int
    documents: int
    languages: dict[str, float]
    units: int = 0


def default_rate(backend: str) -> float:
    """The rate of docs/benchmarks.md for the backend that a build would take here."""
    fast = backend == "gigatoken" or (backend == "auto" and importlib.util.find_spec("gigatoken") is not None)
    return RATES["gigatoken" if fast else "tokenizers"]


def estimate(data: DataConfig, assumptions: Assumptions, tasks: int = 1) -> BuildCost:
    """What building `data` comes to.

    Raises:
        ConfigError: the data file does not say how it is built.
        DataError: a source has neither inputs that can be read nor a published size.
    """
    build, seq_len = data.build, data.seq_len
    if build is None or seq_len is None or not build.sources:
        lacking = "seq_len" if build is not None and build.sources else "build.sources"
        raise ConfigError(f"The data file has no {lacking}, so what a build comes to cannot be told. Add it.")
    sizes = _sizes(build)
    sources = tuple(_cost(size, build, seq_len, assumptions) for size in sizes)
    total = replace(sources[0], name="all", language="")
    for source in sources[1:]:
        total += source
    units = [Unit(f"u{index:05d}", (), 0) for index in range(total.units)]
    largest = max(Counter(task_of(unit, tasks) for unit in units).values(), default=0)
    return BuildCost(sources, total, tasks, largest, tuple(_notes(sizes)))


def _cost(size: _Size, build: BuildConfig, seq_len: int, assumptions: Assumptions) -> SourceCost:
    tokens = int(assumptions.tokens(size.text_bytes, size.languages)) + 2 * size.documents
    rows = math.ceil(tokens * (1 + _PADDING) / seq_len)
    held_out = round(rows * build.eval_fraction)
    units = size.units
    shards = sum(
        max(units, math.ceil(part / SHARD_ROWS)) if units and part else 0 for part in (rows - held_out, held_out)
    )
    return SourceCost(
        name=size.source.name,
        language=max(size.languages, key=lambda language: size.languages[language], default="und"),
        origin=size.origin,
        text_bytes=size.text_bytes,
        documents=size.documents,
        tokens=tokens,
        rows=rows,
        train_rows=rows - held_out,
        units=units,
        shards=shards,
        disk_bytes=rows * (2 * seq_len + _ROW_BYTES) + size.documents * _SEGMENT_BYTES,
        core_hours=tokens / (assumptions.rate * 1e6) / 3600,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def _sizes(build: BuildConfig) -> list[_Size]:
    ready = [source for source in build.sources if _is_ready(source)]
    plan = make_plan(build.model_copy(update={"sources": tuple(ready)})) if ready else Plan((), ())
    of_source: dict[str, list[Unit]] = {source.name: [] for source in ready}
    for unit in plan.units:
        of_source[str(unit.slices[0].input.source)].append(unit)
    sizes = [
        _from_units(source, of_source[source.name]) if source in ready else _published(source)
        for source in build.sources
    ]
    if len(ready) == len(sizes):
        return sizes
    # The units of what is not there yet, or all where their size depends on the whole.
    wanted = unit_bytes(build, sum(size.text_bytes for size in sizes))
    return [
        size if size.units and build.unit_mb is not None else replace(size, units=math.ceil(size.text_bytes / wanted))
        for size in sizes
    ]


def _is_ready(source: SourceConfig) -> bool:
    """Whether the source's own size can be told: its files are there. A dataset of the hub with a published size is not
    asked, as that would download it."""
    if source.text_gb is None:
        return True
    if source.dataset is not None:
        return Path(source.dataset).is_dir()
    try:
        return bool(find_files(source.inputs))
    except DataError:
        return False


def _published(source: SourceConfig) -> _Size:
    assert source.text_gb is not None, "a source without a published size is ready or has been refused"
    text_bytes = int(source.text_gb * 1e9)
    language = {source.language or "und": 1.0}
    return _Size(source, "published", text_bytes, source.documents or 0, language)


def _from_units(source: SourceConfig, units: Sequence[Unit]) -> _Size:
    """The size of the source's units; documents and languages from a sample of them."""
    text_bytes = sum(unit.text_bytes for unit in units)
    languages: Counter[str] = Counter()
    documents = sampled = 0
    step = max(len(units) // _SAMPLE_UNITS, 1)
    for unit in units[::step][:_SAMPLE_UNITS]:
        for document in islice(read_unit(unit, ReadCounts()), _SAMPLE_DOCUMENTS):
            size = len(document.text.encode())
            languages[document.language] += size
            documents, sampled = documents + 1, sampled + size
    shares = {language: size / sampled for language, size in languages.items()}
    expected = round(text_bytes * documents / sampled) if sampled else 0
    return _Size(source, "inputs", text_bytes, expected, shares, len(units))


def _notes(sizes: Sequence[_Size]) -> Iterator[str]:
    for size in sizes:
        published = size.source.text_gb
        if size.origin == "inputs" and published and abs(size.text_bytes / 1e9 / published - 1) > 0.1:
            yield (
                f"The inputs of '{size.source.name}' hold about {size.text_bytes / 1e9:,.1f} GB of text, but "
                f"{published:,.1f} GB are published: is a part of them missing?"
            )


# ---------------------------------------------------------------------------------------------------------------------
# A trial
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """About 20 MB of text built to shards and thrown away: what they came to on one core."""

    backend: str
    text_bytes: int
    tokens: int
    seconds: float
    bytes_per_token: dict[str, float]

    @property
    def rate(self) -> float:
        """Million tokens a second."""
        return self.tokens / self.seconds / 1e6


def measure(inputs: Sequence[Path], data: DataConfig) -> Trial:
    """Build about 20 MB of `inputs` in a temporary folder with the data file's tokenizer, backend and filters.

    Seconds are those of the processor. Duplicates are not looked for.

    Raises:
        ConfigError: the data file names no tokenizer, row length or build.
        DataError: unusable inputs, or nothing in them.
    """
    build, seq_len = data.build, data.seq_len
    if build is None or build.tokenizer is None or seq_len is None:
        raise ConfigError(
            "A trial needs seq_len, and build.tokenizer to encode with: train one with `rxt-dist data tokenizer`, or "
            "give --rate instead."
        )
    vocabulary = load_tokenizer(build.tokenizer).get_vocab_size()
    documents = list(_first_documents(make_plan(build, inputs)))
    if not documents:
        raise DataError(f"{[str(path) for path in inputs]} hold no usable document to try a build with.")
    texts = [document.text for document in documents]
    backend = choose_backend(build.backend, build.tokenizer, texts[:_SAMPLE_DOCUMENTS]).name
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        # As parquet, which most corpora come in, so that reading is in the figure.
        table = pa.table({"text": texts, "language": [document.language for document in documents]})
        pq.write_table(table, out / "trial.parquet", compression="zstd")
        (unit,) = make_plan(BuildConfig(unit_mb=1e6), [out / "trial.parquet"]).units
        (out / UNITS_FOLDER).mkdir()
        shutil.copyfile(build.tokenizer, out / TOKENIZER_FILE)
        fingerprint = tokenizer_fingerprint(build.tokenizer.read_text(encoding="utf-8"))
        spec = ShardSpec(seq_len, vocabulary, fingerprint, PACKING_VERSION, spec_hash="trial")
        clean = build.clean.model_copy(update={"exact_duplicates": False, "near_duplicates": None})
        work = DocumentWork(out, spec, build.eval_fraction, backend, None if clean == CleanConfig() else clean)
        builder = work.open()
        started = time.process_time()
        builder(unit, lambda text_bytes, tokens: None)
        return _trial(work, unit, time.process_time() - started)


def _first_documents(plan: Plan) -> Iterator[Document]:
    left = _TRIAL_BYTES
    for unit in plan.units:
        for document in read_unit(unit, ReadCounts()):
            yield document
            left -= len(document.text.encode())
            if left <= 0:
                return


def _trial(work: DocumentWork, unit: Unit, seconds: float) -> Trial:
    """The figures of a trial, from the manifest of its unit."""
    content = finished_unit(work.out, unit.name, work.spec.spec_hash)
    assert content is not None, "the unit was just built"
    languages: dict[str, Totals] = {}
    for source in (SourceInfo.from_dict(value) for value in content["sources"]):
        languages[source.language] = languages.get(source.language, Totals()) + source.train.totals + source.eval.totals
    total = sum(languages.values(), Totals())
    per_token = {
        language: totals.text_bytes / max(totals.tokens - 2 * totals.documents, 1)
        for language, totals in languages.items()
    }
    return Trial(work.backend, total.text_bytes, total.tokens, seconds, per_token)
