"""A dataset of documents: texts of all kinds, cleaned, tokenised and packed: the `rxt-dist data build` job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.building.builder import Built, Job, Sharing, build, first_few, merged_sources, rows_manifest
from data_prep.building.encode import Choice, choose_backend
from data_prep.building.folder import PLAN_FILE, SPEC_FILE, Say, alone, read_stored
from data_prep.building.rowstream import require_fraction
from data_prep.building.workers import Progress, Show, run_units
from data_prep.cleaning.clean import CleanReport
from data_prep.cleaning.deduplicate import (
    SurveyPass,
    decide_duplicates,
    discard_surveys,
    is_decided,
    removes_duplicates,
)
from data_prep.corpora import ReadCounts, read_unit, require_apart
from data_prep.documents.inputs import discard_records
from data_prep.documents.recheck import require_same_texts
from data_prep.documents.unit import DocumentWork
from data_prep.tokenizing.sample import TrainingSample, spread_documents
from data_prep.tokenizing.tokenizer import (
    load_tokenizer,
    require_vocabulary_size,
    smaller_than_wanted,
    train_tokenizer,
)
from data_prep.units import Plan, Unit, make_plan, reading_problem
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.config.run import DataConfig
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import FORMAT_VERSION, TOKENIZER_FILE, DatasetManifest, SourceInfo, digest_json
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS
from rxt_dist.data.writer import ShardSpec
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import json_bytes, write_json_atomic

CLEAN_REPORT = "clean.json"
EVAL_FRACTION = 0.02

_SHARED = ("tokenizer", "vocab_size", "eval_fraction", "backend")  # fields of a request and of its configuration
_PARITY_DOCUMENTS, _PARITY_CHARACTERS = 200, 1 << 20
_WORTH_A_CHECK = 8_000_000  # the check takes a second or two, in which the reference encodes a few megabytes
# A token takes two bytes. It stands for at least two bytes of text, for three where the vocabulary is large.
_LARGE_VOCABULARY = 1 << 14


@dataclass(frozen=True)
class BuildRequest(Sharing):
    """What is to be built: plain `inputs`, or the sources of `config` (then everything else of it counts too).

    `tokenizer` None trains one of `vocab_size`; `unit_bytes` (of text) None chooses.
    """

    inputs: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    seq_len: int = 256
    vocab_size: int = 4096
    eval_fraction: float = EVAL_FRACTION
    unit_bytes: int | None = None
    backend: str = "auto"
    config: BuildConfig = field(default_factory=BuildConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self.eval_fraction)
        if self.tokenizer is None:
            require_vocabulary_size(self.vocab_size)

    @staticmethod
    def of_data(data: DataConfig, **others: Any) -> BuildRequest:
        """What a data file describes; `others` are fields that it does not: workers, task, tasks, backend.

        Raises:
            ConfigError: the file lacks `build` or `seq_len`.
        """
        build = data.build
        if build is None or data.seq_len is None:
            missing = "build" if build is None else "seq_len"
            raise ConfigError(f"The data file has no `{missing}`, so it does not say how to make {data.path}. Add it.")
        fields: dict[str, Any] = {name: getattr(build, name) for name in _SHARED} | others
        return BuildRequest((), data.path, seq_len=data.seq_len, config=build, **fields)

    def make_plan(self, say: Say = lambda line: None) -> Plan:
        """The plan of the inputs as they are now; `say` is told what is passed over."""
        changed = {} if self.unit_bytes is None else {"unit_mb": self.unit_bytes / 1e6}
        return make_plan(self.config.model_copy(update=changed), self.inputs, say)


@dataclass(frozen=True)
class BuildResult(Built):
    """What a build came to: `counts` is what reading met over all units, `dropped` what filters and duplicates took
    away (None without any), and `passed_over` says in sentences which files are not read."""

    manifest: DatasetManifest | None = None
    counts: ReadCounts = field(default_factory=ReadCounts)
    dropped: CleanReport | None = None
    passed_over: tuple[str, ...] = ()


def build_dataset(
    request: BuildRequest, say: Say = lambda line: None, show: Show = lambda progress: None
) -> BuildResult:
    """Build, or finish building, a dataset.

    Args:
        say: told in a sentence what is being done.
        show: told how far it is, a few times a second.

    Raises:
        DataError: unusable input, an empty corpus, or a folder that belongs to something else.
        ConfigError: a row length, vocabulary or fraction that cannot be, or an `out` that cannot be written to or lies
            within the inputs.
        DiskError: too little space.
    """
    return build(DocumentJob(request, say, show))


def _places(request: BuildRequest) -> list[Path | str]:
    """All places that the build reads text from."""
    if request.inputs:
        return list(request.inputs)
    sources = request.config.sources
    folders = [source.dataset for source in sources if source.dataset is not None and Path(source.dataset).is_dir()]
    return [*(item for source in sources for item in source.inputs), *folders]


class DocumentJob(Job[BuildResult]):
    """Texts to rows of documents, with duplicates found over all of them."""

    result = BuildResult

    def __init__(self, request: BuildRequest, say: Say, show: Show) -> None:
        super().__init__(request.out, request.seq_len, request, say, show)
        require_apart(request.out, _places(request))
        self._request, self._clean = request, request.config.clean
        self.trains_tokenizer = request.tokenizer is None
        self._passed_over: list[str] = []

    def plan(self) -> Sequence[Unit]:
        is_begun = (self.out / SPEC_FILE).is_file()
        if not is_begun:
            self.say("Looking into the inputs")
        self._plan = self._request.make_plan(self._pass_over)
        stored = self.out / PLAN_FILE
        if is_begun and stored.is_file():  # by an earlier version, perhaps: its units were read by the rules of that
            self._plan = replace(self._plan, reading=Plan.from_dict(read_stored(stored)).reading)
        return self._plan.units

    def _pass_over(self, line: str) -> None:
        self.say(line)
        self._passed_over.append(line)

    def settings(self) -> dict[str, Any]:
        """Where the inputs lie and what encodes them are not in it."""
        described = self._plan.to_dict()
        described.pop("reading", None)  # of languages that it does not change, the rows are the same
        inputs = [{key: value for key, value in item.items() if key != "path"} for item in described["inputs"]]
        return {
            "format_version": FORMAT_VERSION,
            "packing_version": PACKING_VERSION,
            "window_documents": WINDOW_DOCUMENTS,
            "seq_len": self.seq_len,
            "eval_fraction": self._request.eval_fraction,
            "trained_vocab_size": self._request.vocab_size if self.trains_tokenizer else None,
            "clean": self._clean.model_dump(mode="json"),
            "plan": digest_json(described | {"inputs": inputs}),
        }

    def difference(self, key: str, old: Any, new: Any) -> str:
        if key != "plan" or not (self.out / PLAN_FILE).is_file():
            return super().difference(key, old, new)
        changed = Plan.from_dict(read_stored(self.out / PLAN_FILE)).differences(self._plan)
        return f"the inputs differ ({first_few(changed)})"

    def files(self) -> dict[str, bytes]:
        return {PLAN_FILE: json_bytes(self._plan.to_dict())}

    def tokenizer_json(self) -> str:
        request = self._request
        if request.tokenizer is not None:
            load_tokenizer(request.tokenizer)
            return request.tokenizer.read_text(encoding="utf-8")
        self.say(f"No tokenizer given: training one with {request.vocab_size} ids on the inputs")
        sample = TrainingSample()
        documents = spread_documents(self._plan.units, sample, ReadCounts())
        trained = train_tokenizer(documents, request.vocab_size, sample, self.say)
        if too_small := smaller_than_wanted(trained.get_vocab_size(), request.vocab_size):
            self.say(too_small)
        return trained.to_str(pretty=True)

    def needed_bytes(self, units: Sequence[Unit], spec: ShardSpec | None) -> int:
        vocab_size = spec.vocab_size if spec else self._request.vocab_size
        bytes_per_token = 3 if vocab_size >= _LARGE_VOCABULARY else 2
        return 2 * sum(unit.text_bytes for unit in units) // bytes_per_token + (1 << 20)

    def before_units(self, units: Sequence[Unit], pending: Sequence[Unit]) -> str:
        """Survey this task's units, and decide on duplicates when all are surveyed."""
        problem = reading_problem(self._plan.reading, units)
        if problem:
            raise DataError(
                f"{self.out} cannot be continued: {problem}, so that it would hold some of each. Finish it with the "
                f"version that began it, or build into another folder."
            )
        if not removes_duplicates(self._clean) or is_decided(self.out, list(units)):
            return ""
        survey = SurveyPass(self.out, self._clean)
        unsurveyed = [unit for unit in units if not survey.is_done(unit)]
        mine = self.sharing.mine(unsurveyed)
        if mine:
            self.say(f"Surveying {len(mine)} of {len(units)} units for duplicates")
            progress = Progress("Surveying", len(mine), sum(unit.text_bytes for unit in mine))
            run_units(survey, mine, self.sharing.workers, progress, self.show, patient=not self.sharing.is_array)
        left = sum(not survey.is_done(unit) for unit in unsurveyed)
        if left:
            return f"Surveyed {len(units) - left} of {len(units)} units; run the same array again when all are done."
        with alone(self.out, self.say):
            if not is_decided(self.out, list(units)):
                self.say("Deciding which documents are duplicates")
                decide_duplicates(self.out, list(units), self._clean)
        return ""

    def work(self, spec: ShardSpec, units: Sequence[Unit], threads: bool) -> DocumentWork:
        """What builds these units, with the backend that is chosen for them."""
        if self._request.backend == "auto" and sum(unit.text_bytes for unit in units) < _WORTH_A_CHECK:
            choice = Choice(
                "tokenizers", "Encoding with tokenizers: so little text is done before gigatoken is checked."
            )
        else:
            choice = choose_backend(self._request.backend, self.out / TOKENIZER_FILE, _parity_documents(self._plan))
        self.say(choice.reason)
        clean = None if self._clean == CleanConfig() else self._clean
        return DocumentWork(self.out, spec, self._request.eval_fraction, choice.name, clean, threads)

    def before_merge(self, units: Sequence[Unit]) -> None:
        require_same_texts(self.out, units, self.sharing.workers, self.say, self.show)

    def merge(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> BuildResult:
        counts, inputs = ReadCounts(), self._plan.inputs
        for content in contents:
            counts.add(ReadCounts(**content["counts"]))
        sources = merged_sources(contents, SourceInfo.from_dict)
        if not sources:
            raise DataError(
                f"The corpus is empty: {len(inputs)} files hold no usable document ({counts.empty} empty, "
                f"{counts.not_text} not text, {counts.too_large} above build.max_document_mb, {counts.documents} "
                f"dropped by the filters). Check the inputs {[item.name for item in inputs[:5]]}."
            )
        files = tuple(InputFile(item.name, item.bytes, fingerprint=item.fingerprint) for item in inputs)
        return BuildResult(
            manifest=rows_manifest(spec, files, sources),
            counts=counts,
            dropped=self._write_clean_report(contents),
            passed_over=tuple(self._passed_over),
        )

    def _write_clean_report(self, contents: Sequence[Mapping[str, Any]]) -> CleanReport | None:
        reports = [content["clean"] for content in contents if "clean" in content]
        if not reports:
            return None
        total = CleanReport()
        for report in reports:
            total.add(CleanReport.from_dict(report))
        write_json_atomic(self.out / CLEAN_REPORT, total.to_dict())
        return total

    def clear(self, units: Sequence[Unit]) -> None:
        discard_surveys(self.out, list(units))
        discard_records(self.out)


def _parity_documents(plan: Plan) -> list[str]:
    """The first documents of the first unit, 200 at most."""
    texts, size = [], 0
    for document in islice(read_unit(plan.units[0], ReadCounts()), _PARITY_DOCUMENTS):
        texts.append(document.text[:_PARITY_CHARACTERS])
        size += len(texts[-1])
        if size >= _PARITY_CHARACTERS:
            break
    return texts
