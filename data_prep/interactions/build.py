"""A dataset of interactions or dialogues: the `rxt-dist data interactions` job.

Single interactions (fine-tuning) are packed into rows like documents, but never cut. Dialogues (the memory stages) are
stored whole, a row of the shard each. Units of work are groups of input files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_prep.building.builder import Built, Job, Sharing, UnitWork, build, merged_sources, rows_manifest
from data_prep.building.encode import choose_backend, open_backend
from data_prep.building.folder import Say, alone
from data_prep.building.rowstream import HeldOut, Ids, RowStream, require_fraction
from data_prep.building.workers import Report, Show
from data_prep.corpora import require_apart
from data_prep.interactions.columns import OUR_COLUMNS, Columns
from data_prep.interactions.encode import EncodedRecord, InteractionEncoder
from data_prep.interactions.hashes import forget_hashes, with_hashes
from data_prep.interactions.reader import (
    InteractionCounts,
    Record,
    find_record_files,
    read_records,
)
from data_prep.interactions.recalls import SpanFinder
from data_prep.readers.base import Input, Slice
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import Unit, group, require_as_seen
from rxt_dist.config.stages import MAX_TURNS
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
from rxt_dist.data.interactions import SYSTEM_QUERY, check_interaction_rows
from rxt_dist.data.manifest import (
    DATASET_FILE,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    DatasetManifest,
    SourceInfo,
    SplitInfo,
)
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import INTERACTION_BOUNDARIES
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import write_json_atomic

REPORT_FILE = "interactions.json"
ENCODING_VERSION = 1
_UNIT_BYTES = 64 << 20
_GROUP_RECORDS = 1024
_WORTH_A_CHECK = 8_000_000  # bytes; the check takes a second or two, in which the reference encodes a few megabytes
_PACKED_SUFFIXES = (".gz", ".zst", ".parquet")
_UNPACKED = 5

Kind = Literal["single", "dialogues"]
Template = Literal["alpha", "beta"]


@dataclass(frozen=True)
class InteractionRequest(Sharing):
    """What is to be built; `seq_len` is the most tokens of an interaction, BOS and EOS included.

    With `skip_other_kinds` records of the other kind are left out and counted: dialogues of several interactions where
    single ones are built, and single ones where dialogues are. With `split_dialogues` each interaction of a dialogue is
    built as a single one. `columns` are the names of the records' fields.

    Raises:
        ConfigError: dialogues are to be split and built, or split and left out.
    """

    inputs: tuple[Path, ...]
    out: Path
    tokenizer: Path
    seq_len: int
    kind: Kind = "single"
    template: Template = "beta"
    eval_fraction: float = 0.02
    skip_other_kinds: bool = False
    split_dialogues: bool = False
    columns: Columns = OUR_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_dialogues and (self.kind == "dialogues" or self.skip_other_kinds):
            raise ConfigError(
                "--split-dialogues builds each interaction of a dialogue as a single one, so that it goes with "
                "--kind single and without --skip-other-kinds."
            )
        require_fraction(self.eval_fraction)


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
class InteractionResult(Built):
    """What a build came to; `sources` is keyed by name."""

    counts: InteractionCounts = field(default_factory=InteractionCounts)
    sources: dict[str, SourceReport] = field(default_factory=dict)


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
        self._writer.add(item.turns, item.recalls)
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
        self._put([("eval", item)] if item.held_out else self._held_out.add(item.rank, item))

    def finish(self, name: str) -> dict[str, Any]:
        self._put(self._held_out.finish())
        splits = {split: asdict(sink.finish()) for split, sink in self._sinks.items()}
        return {"name": name, "language": self.report.language, **splits}

    def _put(self, routed: list[tuple[str, EncodedRecord]]) -> None:
        for split, item in routed:
            self._sinks[split].add(item)


@dataclass(frozen=True)
class InteractionWork(UnitWork):
    """Builds units of records; `threads` lets the tokenizer use all cores."""

    request: InteractionRequest
    backend: str
    threads: bool

    def builder(self) -> _UnitBuilder:
        """Load the tokenizer."""
        return _UnitBuilder(self)


class _UnitBuilder:
    """Builds units; one in each process."""

    def __init__(self, work: InteractionWork) -> None:
        self._out, self._request, self._spec = work.out, work.request, work.spec
        self._backend = open_backend(work.backend, work.out / TOKENIZER_FILE, work.threads)
        self._spans = SpanFinder(work.out / TOKENIZER_FILE)

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Write the unit's shards; what its manifest says. `report` is told (bytes of input passed, tokens made)."""
        counts = InteractionCounts()
        encoder = InteractionEncoder(
            self._backend,
            self._spec.seq_len,
            self._request.template,
            counts,
            self._spans,
            self._request.kind == "dialogues",
        )
        sources: dict[str, _Source] = {}
        ordinal = passed = tokens = 0
        for part in unit.slices:
            unpacked, text_bytes = _unpacked(part.input), 0
            for records in _groups(read_records(part.input, counts, self._request.columns), _GROUP_RECORDS):
                wanted = self._of_kind(records, counts)
                for item in encoder.encode(wanted, ordinal):
                    if item.source not in sources:
                        sources[item.source] = self._source(unit.name, item)
                    sources[item.source].add(item)
                    tokens += item.tokens
                    text_bytes += item.text_bytes
                ordinal += len(wanted)
                # Within a file the text tells, about; a file may be hours of work.
                report(passed + min(text_bytes // unpacked, part.text_bytes), tokens)
            passed += part.text_bytes
            report(passed, tokens)
        for part in unit.slices:
            require_as_seen(part.input)
        names = sorted(sources)
        return {
            "files": [part.input.name for part in unit.slices],
            "counts": asdict(counts),
            "sources": [sources[name].finish(name) for name in names],
            "reports": {name: asdict(sources[name].report) for name in names},
        }

    def _of_kind(self, records: list[Record], counts: InteractionCounts) -> list[Record]:
        """The records that are built; the others are counted.

        Raises:
            DataError: a dialogue where single interactions are built, and nobody asked to leave it out; a dialogue of
                more turns than any stage reads.
        """
        is_single = self._request.kind == "single"
        if not is_single:
            _require_turns(records)
        if self._request.split_dialogues:
            return [
                replace(record, interactions=(interaction,), recalls=(), system=None)
                for record in records
                for interaction in record.interactions
            ]
        if not self._request.skip_other_kinds:
            if is_single:
                _require_single(records)
            return records
        wanted = [record for record in records if (len(record.interactions) == 1) == is_single]
        counts.other_kind += len(records) - len(wanted)
        return wanted

    def _source(self, unit: str, first: EncodedRecord) -> _Source:
        out, spec, fraction = self._out, self._spec, self._request.eval_fraction
        if self._request.kind == "single":
            rows = {split: _Rows(out, f"{first.source}/{split}", unit, spec) for split in SPLITS}
            return _Source(first.language, rows, fraction)
        template = self._request.template
        dialogues = {split: _Dialogues(out, f"{first.source}/{split}", unit, spec, template) for split in SPLITS}
        return _Source(first.language, dialogues, fraction)


def _unpacked(item: Input) -> int:
    """Bytes of text that a byte of a file becomes, about."""
    return _UNPACKED if item.name.lower().endswith(_PACKED_SUFFIXES) else 1


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _require_turns(records: list[Record]) -> None:
    endless = next((record for record in records if len(record.interactions) > MAX_TURNS), None)
    if endless is not None:
        raise DataError(
            f"{endless.place} is a dialogue of {len(endless.interactions):,} interactions, but no stage reads more "
            f"than {MAX_TURNS:,}. Cut it into several, or leave it out."
        )


def _require_single(records: list[Record]) -> None:
    several = next((record for record in records if len(record.interactions) > 1), None)
    if several is not None:
        raise DataError(
            f"{several.place} is a dialogue of {len(several.interactions)} interactions, but single ones are to be "
            f"built: a later turn means nothing without those before it. Build dialogues (--kind dialogues), leave the "
            f"file out, leave such records out and count them (--skip-other-kinds), or build each of their "
            f"interactions by itself all the same (--split-dialogues)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The whole build
# ---------------------------------------------------------------------------------------------------------------------


def build_interactions(
    request: InteractionRequest, say: Say = lambda line: None, show: Show = lambda progress: None
) -> InteractionResult:
    """Build, or finish building, a dataset of interactions or dialogues.

    Args:
        say: told in a sentence what is being done.
        show: told how far it is, a few times a second.

    Raises:
        DataError: unusable input or tokenizer, nothing to build, or a folder that belongs to something else.
        ConfigError: a row length or fraction that cannot be, or an `out` that cannot be written to.
        DiskError: too little space.
    """
    return build(InteractionJob(request, say, show))


class InteractionJob(Job[InteractionResult]):
    """Records of chats to rows of interactions, or to dialogues."""

    boundaries = INTERACTION_BOUNDARIES
    result = InteractionResult

    def __init__(self, request: InteractionRequest, say: Say, show: Show) -> None:
        super().__init__(request.out, request.seq_len, request, say, show)
        require_apart(request.out, request.inputs)
        self._request = request
        load_tokenizer(request.tokenizer)
        self._inputs = find_record_files(request.inputs)

    def plan(self) -> Sequence[Unit]:
        """Consecutive files of at least 64 MiB in all: a file is never cut, so that its records keep their unit."""
        # By one task for all: the others wait, and take what it has found.
        with alone(self.out, self.say):
            keep = self.sharing.is_array and not (self.out / DATASET_FILE).is_file()
            self._inputs = with_hashes(self.out, self._inputs, self.show, keep)
        return group((Slice(item, 0, 1, item.bytes) for item in self._inputs), _UNIT_BYTES)

    def settings(self) -> dict[str, Any]:
        request = self._request
        settings: dict[str, Any] = {
            "format": "interactions",
            "format_version": {"single": FORMAT_VERSION, "dialogues": DIALOGUES_VERSION}[request.kind],
            "encoding_version": ENCODING_VERSION,
            "packing_version": PACKING_VERSION,
            "kind": request.kind,
            "template": request.template,
            "seq_len": request.seq_len,
            "eval_fraction": request.eval_fraction,
            "inputs": [item.in_spec() for item in self._files()],
        }
        # Where single ones are built this changes nothing in any unit that could be built without it, so that a build
        # which met a dialogue goes on with it; single ones among dialogues are either in the rows or not.
        if request.skip_other_kinds and request.kind == "dialogues":
            settings["skip_other_kinds"] = True
        if request.split_dialogues:
            settings["split_dialogues"] = True
        if request.columns.pairs:
            settings["columns"] = dict(request.columns.pairs)
        return settings

    def _files(self) -> tuple[InputFile, ...]:
        return tuple(InputFile(item.name, item.bytes, blake3=item.fingerprint) for item in self._inputs)

    def tokenizer_json(self) -> str:
        return self._request.tokenizer.read_text(encoding="utf-8")

    def needed_bytes(self, units: Sequence[Unit], spec: ShardSpec | None) -> int:
        files = [part.input for unit in units for part in unit.slices]
        return sum(item.bytes * _unpacked(item) for item in files) + (1 << 20)

    def work(self, spec: ShardSpec, units: Sequence[Unit], threads: bool) -> InteractionWork:
        """What builds these units, with the fast backend where it proves equal on the first records, and pays."""
        backend = "tokenizers"
        if sum(unit.text_bytes for unit in units) >= _WORTH_A_CHECK:
            first = islice(read_records(self._inputs[0], InteractionCounts(), self._request.columns), _GROUP_RECORDS)
            texts = [text for record in first for item in record.interactions for text in vars(item).values() if text]
            backend = choose_backend("auto", self.out / TOKENIZER_FILE, texts).name
        # What a unit asks of the request; all of its inputs would travel with each.
        return InteractionWork(self.out, spec, replace(self._request, inputs=()), backend, threads)

    def clear(self, units: Sequence[Unit]) -> None:
        """Forget the hashes of the inputs, which the dataset states."""
        forget_hashes(self.out)

    def merge(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> InteractionResult:
        request, counts = self._request, InteractionCounts()
        reports: dict[str, SourceReport] = {}
        for content in contents:
            counts.add(InteractionCounts(**content["counts"]))
            for name, value in content["reports"].items():
                reports.setdefault(name, SourceReport(value["language"])).add(SourceReport(**value))
        if not reports:
            raise DataError(
                f"There is nothing to build: {len(self._inputs)} files hold no usable record ({counts.empty} empty, "
                f"{counts.other_kind} of the other kind, {counts.too_long} too long for rows of {spec.seq_len}, "
                f"{counts.not_in_template} that the {request.template} template cannot express). Check the inputs "
                f"{[str(path) for path in request.inputs]}."
            )
        reports = dict(sorted(reports.items()))
        report_file = {"kind": request.kind, "template": request.template, "counts": asdict(counts),
                       "sources": {name: asdict(report) for name, report in reports.items()}}  # fmt: skip
        write_json_atomic(self.out / REPORT_FILE, report_file)
        return InteractionResult(manifest=self._manifest(spec, contents), counts=counts, sources=reports)

    def _manifest(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> DatasetManifest | DialogueManifest:
        if self._request.kind == "single":
            return rows_manifest(spec, self._files(), merged_sources(contents, SourceInfo.from_dict))
        # What tells a system prompt from other queries, where the template has no control token for it.
        query = load_tokenizer(self._request.tokenizer).encode(SYSTEM_QUERY, add_special_tokens=False).ids
        return DialogueManifest(
            seq_len=spec.seq_len,
            vocab_size=spec.vocab_size,
            tokenizer_sha256=spec.tokenizer_sha256,
            template=self._request.template,
            system_query=tuple(query) if self._request.template == "alpha" else (),
            spec_hash=spec.spec_hash,
            inputs=self._files(),
            sources=merged_sources(contents, DialogueSource.from_dict),
        )
