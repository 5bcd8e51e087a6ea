"""A whole build: plan -> units -> manifest; in parallel, by job arrays too, and safe to kill at any moment.

    plan.json        which parts of which inputs make a unit; a function of the inputs and settings alone
    build.json       what was asked for; a folder is never changed to another request
    units/*.json     the commits of the units (unit.py), whoever builds them (workers.py)
    dataset.json     written last, by whoever finds all units finished

The number of workers or tasks changes nothing in the result, and may change from run to run. A build that was
interrupted is finished by running it again; finished units are kept, and the root digest is the same as if nothing had
happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from data_prep.building.encode import Choice, choose_backend
from data_prep.building.merge import merge
from data_prep.building.recheck import require_same_texts
from data_prep.building.unit import UNITS_FOLDER, UnitJob
from data_prep.building.workers import KEPT, Progress, Show, run_units
from data_prep.cleaning.clean import CleanReport
from data_prep.cleaning.deduplicate import SurveyJob, decide_duplicates, is_decided, removes_duplicates
from data_prep.corpora import ReadCounts, read_unit, require_apart
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
from rxt_dist.data.manifest import FORMAT_VERSION, TOKENIZER_FILE, DatasetManifest, digest_json, tokenizer_fingerprint
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS
from rxt_dist.data.rows import MAX_VOCABULARY
from rxt_dist.data.writer import ShardSpec
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import access_errors, require_folder, require_free_space, write_atomic, write_json_atomic
from rxt_dist.locks import Lock, locked

SPEC_FILE, PLAN_FILE = "build.json", "plan.json"
EVAL_FRACTION = 0.02

_SHARED = ("tokenizer", "vocab_size", "eval_fraction", "backend")  # fields of a request and of its configuration
_LOCK, _SETUP_LOCK = ".lock", ".setup.lock"
_PARITY_DOCUMENTS, _PARITY_CHARACTERS = 200, 1 << 20
_WORTH_A_CHECK = 8_000_000  # the check takes a second or two, in which the reference encodes a few megabytes
# A token takes two bytes. It stands for at least two bytes of text, for three where the vocabulary is large.
_LARGE_VOCABULARY = 1 << 14

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built: plain `inputs`, or the sources of `config` (then everything else of it counts too).

    `tokenizer` None trains one of `vocab_size`; `unit_bytes` (of text) None chooses. With `tasks` n only the units of
    `task` (0 to n - 1) are built, and the dataset is finished by whichever task finds that all are done.
    """

    inputs: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    seq_len: int = 256
    vocab_size: int = 4096
    eval_fraction: float = EVAL_FRACTION
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    unit_bytes: int | None = None
    backend: str = "auto"
    config: BuildConfig = field(default_factory=BuildConfig)
    task: int = 0
    tasks: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; at least 1 is needed.")
        if self.tasks is not None and not 0 <= self.task < self.tasks:
            raise ConfigError(
                f"--task is {self.task}; with --tasks {self.tasks} it must be from 0 to {self.tasks - 1}."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction is {self.eval_fraction}; it must be at least 0 and below 1.")
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
class BuildResult:
    """What a build came to. `manifest` is None while units are left to other tasks, and `unfinished` says so.

    `counts` is what reading met over all units, `dropped` what filters and duplicates took away (None without any), and
    `passed_over` says in sentences which files are not read; `units_kept` is how many units had been finished before.
    """

    manifest: DatasetManifest | None
    counts: ReadCounts
    units: int
    units_kept: int
    unfinished: str = ""
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
    require_folder(request.out)
    require_apart(request.out, _places(request))
    passed_over: list[str] = []

    def pass_over(line: str) -> None:
        say(line)
        passed_over.append(line)

    request.out.mkdir(parents=True, exist_ok=True)
    with access_errors(request.out, KEPT), _folder(request, say):
        plan, spec = _prepare(request, say, pass_over)
        (request.out / UNITS_FOLDER).mkdir(exist_ok=True)
        clean = request.config.clean
        job = UnitJob(request.out, spec, request.eval_fraction, "tokenizers", None if clean == CleanConfig() else clean)
        pending = [unit for unit in plan.units if not job.is_done(unit)]
        if pending:
            _require_same_reading(request.out, plan)
        kept = len(plan.units) - len(pending)
        mine = units_of_task(pending, request.task, request.tasks)
        if pending and removes_duplicates(clean):
            missing = _find_duplicates(request, plan, say, show)
            if missing:
                return BuildResult(None, ReadCounts(), len(plan.units), kept, missing)
        if mine:
            _build(request, job, plan, mine, say, show)
        left = sum(not job.is_done(unit) for unit in pending)
        if left:
            missing = f"{left} of {len(plan.units)} units are left to other tasks; the last one finishes it all."
            return BuildResult(None, ReadCounts(), len(plan.units), kept, missing)
        with _setup(request.out, say):
            require_same_texts(request.out, plan, request.workers, say, show)
            manifest, counts, dropped = merge(request.out, plan, spec)
        return BuildResult(manifest, counts, len(plan.units), kept, dropped=dropped, passed_over=tuple(passed_over))


def _places(request: BuildRequest) -> list[Path | str]:
    """All places that the build reads text from."""
    if request.inputs:
        return list(request.inputs)
    sources = request.config.sources
    folders = [source.dataset for source in sources if source.dataset is not None and Path(source.dataset).is_dir()]
    return [*(item for source in sources for item in source.inputs), *folders]


def units_of_task(units: Sequence[Unit], task: int, tasks: int | None) -> list[Unit]:
    """The units that a task of an array builds: by a hash of the unit's name, so that each has one task for any number
    of tasks."""
    if tasks is None:
        return list(units)
    return [u for u in units if int.from_bytes(blake3(u.name.encode()).digest(8), "little") % tasks == task]


def _build(request: BuildRequest, job: UnitJob, plan: Plan, mine: list[Unit], say: Say, show: Show) -> None:
    """Choose a backend and build these units."""
    text_bytes = sum(unit.text_bytes for unit in mine)
    require_free_space(request.out, _shard_bytes(text_bytes, job.spec.vocab_size), "Building the shards")
    if request.backend == "auto" and text_bytes < _WORTH_A_CHECK:
        choice = Choice("tokenizers", "Encoding with tokenizers: so little text is done before gigatoken is checked.")
    else:
        choice = choose_backend(request.backend, request.out / TOKENIZER_FILE, _parity_documents(plan))
    say(choice.reason)
    processes = min(request.workers, len(mine))
    of = f" (task {request.task} of {request.tasks})" if request.tasks is not None else ""
    say(f"Building {len(mine)} of {len(plan.units)} units with {processes} process{'es' * (processes > 1)}{of}")
    # With one process for several cores the reference tokenizer's own threads use the others.
    threads = processes == 1 and request.workers > 1
    progress = Progress("Building", len(mine), text_bytes)
    job = UnitJob(job.out, job.spec, job.eval_fraction, choice.name, job.clean, threads)
    run_units(job, mine, request.workers, progress, show, patient=request.tasks is None)


def _find_duplicates(request: BuildRequest, plan: Plan, say: Say, show: Show) -> str:
    """Survey this task's units, and decide when all units are surveyed. Returns what is missing, if anything is."""
    out, units, clean = request.out, list(plan.units), request.config.clean
    if is_decided(out, units):
        return ""
    job = SurveyJob(out, clean)
    unsurveyed = [unit for unit in units if not job.is_done(unit)]
    mine = units_of_task(unsurveyed, request.task, request.tasks)
    if mine:
        say(f"Surveying {len(mine)} of {len(units)} units for duplicates")
        progress = Progress("Surveying", len(mine), sum(unit.text_bytes for unit in mine))
        run_units(job, mine, request.workers, progress, show, patient=request.tasks is None)
    left = sum(not job.is_done(unit) for unit in unsurveyed)
    if left:
        return f"Surveyed {len(units) - left} of {len(units)} units; run the same array again when all are done."
    with _setup(out, say):
        if not is_decided(out, units):
            say("Deciding which documents are duplicates")
            decide_duplicates(out, units, clean)
    return ""


def _parity_documents(plan: Plan) -> list[str]:
    """The first documents of the first unit, 200 at most."""
    texts, size = [], 0
    for document in islice(read_unit(plan.units[0], ReadCounts()), _PARITY_DOCUMENTS):
        texts.append(document.text[:_PARITY_CHARACTERS])
        size += len(texts[-1])
        if size >= _PARITY_CHARACTERS:
            break
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The folder: one plain build, or any number of tasks
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _folder(request: BuildRequest, say: Say) -> Iterator[None]:
    """Hold the folder: alone, or together with the other tasks of an array.

    Raises:
        DataError: another build holds it.
    """
    array = request.tasks is not None
    with locked(request.out / _LOCK, shared=array) as state:
        if state is Lock.BUSY:
            raise DataError(f"Another build is writing to {request.out}. Wait for it, or choose another --out.")
        if state is Lock.UNSUPPORTED:
            say(f"The file system of {request.out} knows no locks: a unit may be built twice, and comes out the same.")
        elif not array:
            for leftover in request.out.rglob(".*.tmp.*"):
                leftover.unlink(missing_ok=True)
        yield


@contextmanager
def _setup(out: Path, say: Say) -> Iterator[None]:
    """Alone among the tasks, for what is done once: planning, training a tokenizer, merging."""
    with locked(out / _SETUP_LOCK) as state:
        if state is Lock.BUSY:
            say("Waiting for another task, which prepares or finishes the dataset")
        else:
            yield from _alone(out, state)
            return
    with locked(out / _SETUP_LOCK, wait=True) as state:
        yield from _alone(out, state)


def _alone(out: Path, state: Lock) -> Iterator[None]:
    if state is Lock.TAKEN:
        for leftover in out.glob(".*.tmp.*"):  # only who holds this lock writes there
            leftover.unlink(missing_ok=True)
    yield


# ---------------------------------------------------------------------------------------------------------------------
# Plan, tokenizer and specification
# ---------------------------------------------------------------------------------------------------------------------


def _prepare(request: BuildRequest, say: Say, pass_over: Say) -> tuple[Plan, ShardSpec]:
    """The plan, and what all shards have in common; set up by the first run and compared by all later ones.

    Args:
        pass_over: told which files are not read.

    Raises:
        DataError: the folder belongs to a build with another specification, or holds something else.
    """
    plan = None
    if not (request.out / SPEC_FILE).is_file():
        with _setup(request.out, say):
            if not (request.out / SPEC_FILE).is_file():  # or else another task did it meanwhile
                plan = _set_up(request, say, pass_over)
    plan = plan or _read_as_before(request.out, request.make_plan(pass_over))
    old = _read_json(request.out / SPEC_FILE)
    _compare(request.out, old, _settings(request, plan), plan)
    _put_tokenizer(request, plan, old, say)
    if not _plan_is_kept(request.out, plan):  # lost, or the inputs lie elsewhere now
        with _setup(request.out, say):
            write_json_atomic(request.out / PLAN_FILE, plan.to_dict())
    return plan, _shard_spec(request, old)


def _set_up(request: BuildRequest, say: Say, pass_over: Say) -> Plan:
    """Plan, put the tokenizer in place, and write `build.json` last: from then on the folder is this build's."""
    out = request.out
    foreign = sorted(item.name for item in out.iterdir() if not item.name.startswith("."))
    if set(foreign) - {TOKENIZER_FILE, PLAN_FILE}:
        raise DataError(f"{out} is not empty and is not a dataset (it holds {foreign[:5]}). Choose another --out.")
    ShardSpec(request.seq_len, MAX_VOCABULARY, "", PACKING_VERSION, "")  # an impossible row length, before any work
    say("Looking into the inputs")
    plan = request.make_plan(pass_over)
    require_free_space(out, _shard_bytes(plan.text_bytes, request.vocab_size), "Building the shards")
    settings = _settings(request, plan)
    tokenizer = _tokenizer_json(request, plan, say)
    spec = settings | {"tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    write_atomic(out / TOKENIZER_FILE, tokenizer)
    _shard_spec(request, spec)
    write_json_atomic(out / PLAN_FILE, plan.to_dict())
    write_json_atomic(out / SPEC_FILE, spec)
    return plan


def _settings(request: BuildRequest, plan: Plan) -> dict[str, Any]:
    """All that decides the rows, apart from the tokenizer. Where the inputs lie and what encodes them are not in it."""
    described = plan.to_dict()
    described.pop("reading", None)  # in another folder, or of languages that it does not change, the rows are the same
    inputs = [{key: value for key, value in item.items() if key != "path"} for item in described["inputs"]]
    return {
        "format_version": FORMAT_VERSION,
        "packing_version": PACKING_VERSION,
        "window_documents": WINDOW_DOCUMENTS,
        "seq_len": request.seq_len,
        "eval_fraction": request.eval_fraction,
        "trained_vocab_size": None if request.tokenizer else request.vocab_size,
        "clean": request.config.clean.model_dump(mode="json"),
        "plan": digest_json(described | {"inputs": inputs}),
    }


def _shard_spec(request: BuildRequest, spec: dict[str, Any]) -> ShardSpec:
    return ShardSpec(
        seq_len=request.seq_len,
        vocab_size=load_tokenizer(request.out / TOKENIZER_FILE).get_vocab_size(),
        tokenizer_sha256=spec["tokenizer_sha256"],
        packing_version=PACKING_VERSION,
        spec_hash=digest_json(spec),
    )


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any], plan: Plan) -> None:
    """Raise DataError if any key of `new` differs in the specification of the folder."""
    differences = []
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key == "plan" and (out / PLAN_FILE).is_file():
            changed = Plan.from_dict(_read_json(out / PLAN_FILE)).differences(plan)
            differences.append(f"the inputs differ ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''})")
        else:
            differences.append(f"{key} was {old.get(key)} and is now {value}")
    if differences:
        raise DataError(
            f"{out} was built with another specification: {'; '.join(differences)}. A dataset is never changed in "
            f"place: choose another --out, or delete the folder."
        )


def _read_as_before(out: Path, plan: Plan) -> Plan:
    """The plan, which an earlier version may have begun, with the rules by which the folder's units were read."""
    path = out / PLAN_FILE
    return replace(plan, reading=Plan.from_dict(_read_json(path)).reading) if path.is_file() else plan


def _require_same_reading(out: Path, plan: Plan) -> None:
    """Raise DataError where the units that are left would be read by other rules than those that are there."""
    problem = reading_problem(plan.reading, plan.units)
    if problem:
        raise DataError(
            f"{out} cannot be continued: {problem}, so that it would hold some of each. Finish it with the version "
            f"that began it, or build into another folder."
        )


def _plan_is_kept(out: Path, plan: Plan) -> bool:
    return (out / PLAN_FILE).is_file() and bool(_read_json(out / PLAN_FILE) == plan.to_dict())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Choose another --out, or delete {path.parent}.") from error
    return value


def _tokenizer_json(request: BuildRequest, plan: Plan, say: Say) -> str:
    """The given tokenizer, or one trained now."""
    if request.tokenizer is not None:
        load_tokenizer(request.tokenizer)
        return request.tokenizer.read_text(encoding="utf-8")
    say(f"No tokenizer given: training one with {request.vocab_size} ids on the inputs")
    sample = TrainingSample()
    documents = spread_documents(plan.units, sample, ReadCounts())
    trained = train_tokenizer(documents, request.vocab_size, sample, say)
    if too_small := smaller_than_wanted(trained.get_vocab_size(), request.vocab_size):
        say(too_small)
    return trained.to_str(pretty=True)


def _put_tokenizer(request: BuildRequest, plan: Plan, spec: dict[str, Any], say: Say) -> None:
    """Refuse another tokenizer than the folder's; put the folder's in place again if it was lost or damaged."""
    target, wanted = request.out / TOKENIZER_FILE, spec.get("tokenizer_sha256")
    try:
        stored = tokenizer_fingerprint(target.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = None
    text = None
    if request.tokenizer is not None:
        text = _tokenizer_json(request, plan, say)
        _compare(request.out, spec, {"tokenizer_sha256": tokenizer_fingerprint(text)}, plan)
    if stored != wanted:
        with _setup(request.out, say):
            text = text or _tokenizer_json(request, plan, say)
            _compare(request.out, spec, {"tokenizer_sha256": tokenizer_fingerprint(text)}, plan)
            write_atomic(target, text)


def _shard_bytes(text_bytes: int, vocab_size: int) -> int:
    """What shards of so much text need at most, about."""
    return 2 * text_bytes // (3 if vocab_size >= _LARGE_VOCABULARY else 2) + (1 << 20)
