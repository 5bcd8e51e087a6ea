"""Interactions and dialogues -> shards with a manifest: the `rxt-dist data interactions` build.

Single interactions (fine-tuning) are packed into rows like documents, but never cut. Dialogues (the memory stages) are
stored whole, a row of the shard each. Units of work are groups of input files; an interrupted build is finished by
running it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_prep.building.encode import choose_backend, open_backend
from data_prep.building.folder import UnitFolder, opened
from data_prep.building.rowstream import HeldOut, Ids, RowStream
from data_prep.corpora import CorpusFile, require_apart
from data_prep.interactions.encode import EncodedRecord, InteractionEncoder
from data_prep.interactions.reader import InteractionCounts, Record, find_record_files, read_records
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import identity
from rxt_dist.data.dialogues import (
    DIALOGUES_VERSION,
    DialogueManifest,
    DialogueSource,
    DialogueSplit,
    DialogueTotals,
    DialogueWriter,
    dialogue_metadata,
)
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.interactions import check_interaction_rows
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    DatasetManifest,
    SourceInfo,
    SplitInfo,
    blake3_file,
    tokenizer_fingerprint,
)
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import INTERACTION_BOUNDARIES
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import require_folder, require_free_space, write_json_atomic

REPORT_FILE = "interactions.json"
ENCODING_VERSION = 1
_UNIT_BYTES = 64 << 20
_GROUP_RECORDS = 1024
_WORTH_A_CHECK = 8_000_000  # bytes; the check takes a second or two, in which the reference encodes a few megabytes
_PACKED_SUFFIXES = (".gz", ".zst", ".parquet")
_UNPACKED = 5

Kind = Literal["single", "dialogues"]
Template = Literal["alpha", "beta"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class InteractionRequest:
    """What is to be built; `seq_len` is the most tokens of an interaction, BOS and EOS included.

    With `skip_other_kinds` records of the other kind are left out and counted: dialogues of several interactions where
    single ones are built, and single ones where dialogues are.
    """

    inputs: tuple[Path, ...]
    out: Path
    tokenizer: Path
    seq_len: int
    kind: Kind = "single"
    template: Template = "beta"
    eval_fraction: float = 0.02
    skip_other_kinds: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction is {self.eval_fraction}; it must be at least 0 and below 1.")


@dataclass
class SourceReport:
    """One source, both splits: `targets` are the tokens with loss."""

    language: str
    interactions: int = 0
    dialogues: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, other: SourceReport) -> None:
        self.interactions += other.interactions
        self.dialogues += other.dialogues
        self.tokens += other.tokens
        self.targets += other.targets


@dataclass(frozen=True)
class InteractionResult:
    """A finished build. `sources` is keyed by name; `units_kept` were finished by an earlier run."""

    manifest: DatasetManifest | DialogueManifest
    counts: InteractionCounts
    sources: dict[str, SourceReport]
    units: int
    units_kept: int


# ---------------------------------------------------------------------------------------------------------------------
# One unit
# ---------------------------------------------------------------------------------------------------------------------


class _Rows:
    """Single interactions of one source and split."""

    def __init__(self, root: Path, directory: str, stem: str, spec: ShardSpec) -> None:
        self._stream = RowStream(ShardWriter(root, directory, stem, spec, check_interaction_rows), spec.seq_len)

    def add(self, item: EncodedRecord) -> None:
        # The packer puts BOS and EOS around what it is given.
        self._stream.add(Ids(item.ordinal, item.turns[0][1:-1], item.text_bytes, item.literals))

    def finish(self) -> SplitInfo:
        return self._stream.finish()


class _Dialogues:
    """Dialogues of one source and split."""

    def __init__(self, root: Path, directory: str, stem: str, spec: ShardSpec, template: str) -> None:
        metadata = dialogue_metadata(spec.seq_len, spec.tokenizer_sha256, template, spec.spec_hash)
        self._writer = DialogueWriter(root, directory, stem, spec.vocab_size, metadata)
        self._dialogues = self._turns = self._tokens = self._targets = self._text_bytes = 0

    def add(self, item: EncodedRecord) -> None:
        self._writer.add(item.turns)
        self._dialogues += 1
        self._turns += len(item.turns)
        self._tokens += item.tokens
        self._targets += item.targets
        self._text_bytes += item.text_bytes

    def finish(self) -> DialogueSplit:
        totals = DialogueTotals(self._dialogues, self._turns, self._tokens, self._targets, self._text_bytes)
        return DialogueSplit(totals, self._writer.finish())


class _Source:
    """One source of a unit: routes its records to training or evaluation."""

    def __init__(self, language: str, sinks: dict[str, _Rows] | dict[str, _Dialogues], eval_fraction: float) -> None:
        self._sinks = sinks
        self._is_dialogues = isinstance(sinks["train"], _Dialogues)
        self._held_out: HeldOut[EncodedRecord] = HeldOut(eval_fraction)
        self.report = SourceReport(language)

    def add(self, item: EncodedRecord) -> None:
        self.report.add(SourceReport("", len(item.turns), int(self._is_dialogues), item.tokens, item.targets))
        self._put(self._held_out.add(item.rank, item))

    def finish(self, name: str) -> dict[str, Any]:
        self._put(self._held_out.finish())
        splits = {split: asdict(sink.finish()) for split, sink in self._sinks.items()}
        return {"name": name, "language": self.report.language, **splits}

    def _put(self, routed: list[tuple[str, EncodedRecord]]) -> None:
        for split, item in routed:
            self._sinks[split].add(item)


class _UnitBuilder:
    """Builds and commits units."""

    def __init__(
        self,
        folder: UnitFolder,
        request: InteractionRequest,
        spec: ShardSpec,
        backend: str,
        seen: dict[Path, tuple[int, ...]],
    ) -> None:
        self._folder, self._request, self._spec, self._seen = folder, request, spec, seen
        self._backend = open_backend(backend, request.tokenizer, threads=True)

    def build(self, unit: str, files: list[CorpusFile], report: Callable[[int], None]) -> None:
        """Write the unit's shards, then its manifest. `report` is told bytes of input passed."""
        counts = InteractionCounts()
        encoder = InteractionEncoder(self._backend, self._spec.seq_len, self._request.template, counts)
        sources: dict[str, _Source] = {}
        ordinal = 0
        for file in files:
            for records in _groups(read_records(file, counts), _GROUP_RECORDS):
                wanted = self._of_kind(records, counts)
                for item in encoder.encode(wanted, ordinal):
                    if item.source not in sources:
                        sources[item.source] = self._source(unit, item)
                    sources[item.source].add(item)
                ordinal += len(wanted)
            report(file.path.stat().st_size)
        _require_unchanged(files, self._seen)
        names = sorted(sources)
        content = {
            "files": [file.name for file in files],
            "counts": asdict(counts),
            "sources": [sources[name].finish(name) for name in names],
            "reports": {name: asdict(sources[name].report) for name in names},
        }
        self._folder.commit(unit, content)

    def _of_kind(self, records: list[Record], counts: InteractionCounts) -> list[Record]:
        """The records that are built; the others are counted.

        Raises:
            DataError: a dialogue where single interactions are built, and nobody asked to leave it out.
        """
        is_single = self._request.kind == "single"
        if not self._request.skip_other_kinds:
            if is_single:
                _require_single(records)
            return records
        wanted = [record for record in records if (len(record.interactions) == 1) == is_single]
        counts.other_kind += len(records) - len(wanted)
        return wanted

    def _source(self, unit: str, first: EncodedRecord) -> _Source:
        root, fraction = self._folder.root, self._request.eval_fraction
        if self._request.kind == "single":
            rows = {split: _Rows(root, f"{first.source}/{split}", unit, self._spec) for split in SPLITS}
            return _Source(first.language, rows, fraction)
        template = self._request.template
        dialogues = {split: _Dialogues(root, f"{first.source}/{split}", unit, self._spec, template) for split in SPLITS}
        return _Source(first.language, dialogues, fraction)


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _require_single(records: list[Record]) -> None:
    several = next((record for record in records if len(record.interactions) > 1), None)
    if several is not None:
        raise DataError(
            f"{several.place} is a dialogue of {len(several.interactions)} interactions, but single ones are to be "
            f"built: a later turn means nothing without those before it. Build dialogues (--kind dialogues), leave the "
            f"file out, or leave such records out and count them (--skip-other-kinds)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The whole build
# ---------------------------------------------------------------------------------------------------------------------


def build_interactions(request: InteractionRequest, progress: Progress = lambda done, total: None) -> InteractionResult:
    """Build, or finish building, a dataset of interactions or dialogues.

    Args:
        progress: told bytes of input done and in all.

    Raises:
        DataError: unusable input or tokenizer, nothing to build, or a folder that belongs to something else.
        ConfigError: a row length or fraction that cannot be, or an `out` that cannot be written to.
        DiskError: too little space.
    """
    require_folder(request.out)
    require_apart(request.out, request.inputs)
    files = find_record_files(request.inputs)
    tokenizer = load_tokenizer(request.tokenizer)
    tokenizer_json = request.tokenizer.read_text(encoding="utf-8")
    seen = {file.path: identity(file.path.stat()) for file in files}
    inputs = [InputFile(file.name, file.path.stat().st_size, blake3_file(file.path)) for file in files]
    tokenizer_sha256 = tokenizer_fingerprint(tokenizer_json)
    base: dict[str, Any] = {
        "format": "interactions",
        "format_version": {"single": FORMAT_VERSION, "dialogues": DIALOGUES_VERSION}[request.kind],
        "encoding_version": ENCODING_VERSION,
        "packing_version": PACKING_VERSION,
        "kind": request.kind,
        "template": request.template,
        "seq_len": request.seq_len,
        "eval_fraction": request.eval_fraction,
        "tokenizer_sha256": tokenizer_sha256,
        "inputs": [item.in_spec() for item in inputs],
    }
    # Where single ones are built this changes nothing in any unit that could be built without it, so that a build which
    # met a dialogue goes on with it; single ones among dialogues are either in the rows or not.
    if request.skip_other_kinds and request.kind == "dialogues":
        base["skip_other_kinds"] = True
    ShardSpec(request.seq_len, tokenizer.get_vocab_size(), tokenizer_sha256, PACKING_VERSION, "")
    require_free_space(request.out, _needed_bytes(files), "Building the shards")
    with opened(request.out, base, tokenizer_json) as folder:
        spec = ShardSpec(
            seq_len=request.seq_len,
            vocab_size=tokenizer.get_vocab_size(),
            tokenizer_sha256=tokenizer_sha256,
            packing_version=PACKING_VERSION,
            spec_hash=folder.spec_hash,
            boundaries=INTERACTION_BOUNDARIES,
        )
        units = _plan(files)
        pending = [unit for unit in units if folder.finished(unit) is None]
        total, done = sum(file.path.stat().st_size for unit in pending for file in units[unit]), 0
        builder = _UnitBuilder(folder, request, spec, _backend_for(request, files, total), seen)
        for unit in pending:

            def report(step: int) -> None:
                nonlocal done
                done += step
                progress(done, total)

            builder.build(unit, units[unit], report)
        return _merge(request, folder, list(units), spec, tuple(inputs), len(units) - len(pending))


def _require_unchanged(files: list[CorpusFile], seen: dict[Path, tuple[int, ...]]) -> None:
    """Refuse files that were written to since they were hashed, before a unit of what is there now is committed."""
    for file in files:
        if not file.path.exists() or identity(file.path.stat()) != seen[file.path]:
            raise DataError(
                f"{file.path} was changed while the dataset was built. Restore it and run the same command again, or "
                f"build into another folder when nothing writes to the file."
            )


def _backend_for(request: InteractionRequest, files: list[CorpusFile], size: int) -> str:
    """The name of the backend: the fast one where it proves equal on the probe and the first records, and pays."""
    if size < _WORTH_A_CHECK:
        return "tokenizers"
    first = islice(read_records(files[0], InteractionCounts()), _GROUP_RECORDS)
    texts = [text for record in first for item in record.interactions for text in vars(item).values() if text]
    return choose_backend("auto", request.tokenizer, texts).name


def _plan(files: list[CorpusFile]) -> dict[str, list[CorpusFile]]:
    """Units of consecutive files of at least 64 MiB in all."""
    units: dict[str, list[CorpusFile]] = {}
    size = _UNIT_BYTES
    for file in files:
        if size >= _UNIT_BYTES:
            size, group = 0, units.setdefault(f"u{len(units):05d}", [])
        group.append(file)
        size += file.path.stat().st_size
    return units


def _needed_bytes(files: list[CorpusFile]) -> int:
    sizes = [(file.path.stat().st_size, file.name.lower().endswith(_PACKED_SUFFIXES)) for file in files]
    return sum(size * (_UNPACKED if packed else 1) for size, packed in sizes) + (1 << 20)


def _merge(
    request: InteractionRequest,
    folder: UnitFolder,
    units: list[str],
    spec: ShardSpec,
    inputs: tuple[InputFile, ...],
    kept: int,
) -> InteractionResult:
    """The manifests of all units as that of the dataset."""
    counts = InteractionCounts()
    reports: dict[str, SourceReport] = {}
    sources: dict[str, Any] = {}
    read = SourceInfo.from_dict if request.kind == "single" else DialogueSource.from_dict
    for unit in units:
        content = folder.finished(unit)
        assert content is not None, "a unit vanished while the build held the lock"
        counts.add(InteractionCounts(**content["counts"]))
        for value in content["sources"]:
            name, source = value["name"], read(value)
            sources[name] = sources[name] + source if name in sources else source
        for name, value in content["reports"].items():
            reports.setdefault(name, SourceReport(value["language"])).add(SourceReport(**value))
    if not sources:
        raise DataError(
            f"There is nothing to build: {len(inputs)} files hold no usable record ({counts.empty} empty, "
            f"{counts.other_kind} of the other kind, {counts.too_long} too long for rows of {spec.seq_len}, "
            f"{counts.not_in_template} that the {request.template} template cannot express). Check the inputs "
            f"{[str(path) for path in request.inputs]}."
        )
    sources_in_order = tuple(sources[name] for name in sorted(sources))
    report_file = {"kind": request.kind, "template": request.template, "counts": asdict(counts),
                   "sources": {name: asdict(reports[name]) for name in sorted(reports)}}  # fmt: skip
    write_json_atomic(folder.root / REPORT_FILE, report_file)
    manifest = _finished_manifest(request, folder.root, units, spec, inputs, sources_in_order)
    return InteractionResult(manifest, counts, dict(sorted(reports.items())), len(units), kept)


def _finished_manifest(
    request: InteractionRequest,
    root: Path,
    units: list[str],
    spec: ShardSpec,
    inputs: tuple[InputFile, ...],
    sources: tuple[Any, ...],
) -> DatasetManifest | DialogueManifest:
    common = (spec.seq_len, spec.vocab_size, spec.tokenizer_sha256)
    if request.kind == "single":
        rows = DatasetManifest(*common, spec.spec_hash, spec.packing_version, inputs, sources, (), spec.boundaries)
        return finish_dataset(root, rows, units)
    dialogues = DialogueManifest(*common, request.template, spec.spec_hash, inputs, sources)
    return finish_dataset(root, dialogues, units)
