"""One builder for datasets of every kind: specify, plan, lock, claim, build, commit, merge; safe to kill at any moment.

A `Job` says what a kind of dataset is made of; the builder does the rest in the same way for all of them. The number of
workers or tasks changes nothing in the result, and may change from run to run. A build that was interrupted is finished
by running it again: finished units are kept, and the root digest is the same as if nothing had happened. `dataset.json`
is written last, by whoever finds all units finished.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from blake3 import blake3

from data_prep.building.folder import (
    KEPT,
    SPEC_FILE,
    UNITS_FOLDER,
    Say,
    alone,
    commit_unit,
    finished_unit,
    held,
    read_stored,
    remove_locks,
    require_ours,
    stored_fingerprint,
)
from data_prep.building.workers import Progress, Report, Show, run_units
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import Unit
from rxt_dist.data.dialogues import AnyManifest, DialogueSource
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import TOKENIZER_FILE, DatasetManifest, SourceInfo, digest_json, tokenizer_fingerprint
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import BOUNDARY_POLICY, MAX_VOCABULARY
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import access_errors, require_folder, require_free_space, write_atomic, write_json_atomic

_DIFFERENCES, _TASKS_NAMED, _BRIEF_CHARACTERS = 5, 8, 60


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the work of a request is shared: `workers` processes; with `tasks` n, an array of n jobs, only the units of
    `task` (0 to n - 1) are built, and the dataset is finished by whichever task finds that all are done."""

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    task: int | None = None
    tasks: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; at least 1 is needed.")
        if (self.task is None) != (self.tasks is None):
            raise ConfigError("--task and --tasks go together: this is job --task (from 0) of --tasks.")
        if self.task is not None and self.tasks is not None and not 0 <= self.task < self.tasks:
            raise ConfigError(
                f"--task is {self.task}; with --tasks {self.tasks} it must be from 0 to {self.tasks - 1}."
            )

    @property
    def is_array(self) -> bool:
        return self.tasks is not None

    def mine(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that this task builds."""
        return [unit for unit in units if self.tasks is None or task_of(unit, self.tasks) == self.task]


def task_of(unit: Unit, tasks: int) -> int:
    """The task of an array that builds a unit: by a hash of its name, so that each has one for any number of tasks."""
    return int.from_bytes(blake3(unit.name.encode()).digest(8), "little") % tasks


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build came to. `manifest` is None while units are left to other tasks, and `unfinished` says so;
    `units_kept` is how many of the `units` had been finished before."""

    manifest: AnyManifest | None = None
    units: int = 0
    units_kept: int = 0
    unfinished: str = ""


BuiltT = TypeVar("BuiltT", bound=Built)
SourceT = TypeVar("SourceT", SourceInfo, DialogueSource)


@dataclass(frozen=True)
class UnitWork(ABC):
    """What building a unit needs to know, apart from the unit; it travels to worker processes."""

    out: Path
    spec: ShardSpec

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit is committed."""
        return finished_unit(self.out, unit.name, self.spec.spec_hash) is not None

    def open(self) -> Callable[[Unit, Report], None]:
        """What builds a unit and commits it."""
        build = self.builder()

        def work(unit: Unit, report: Report) -> None:
            commit_unit(self.out, unit.name, self.spec.spec_hash, build(unit, report))

        return work

    @abstractmethod
    def builder(self) -> Callable[[Unit, Report], Mapping[str, Any]]:
        """Load what the work needs, once in each process, and return what writes a unit's shards; that gives the
        content of the unit's manifest, with its `sources`, and tells (bytes passed, tokens made) on the way."""


class Job(ABC, Generic[BuiltT]):
    """One kind of dataset: what decides its rows, its units, how one is built, and what all of them come to.

    Args:
        say: told in a sentence what is being done.
        show: told how far it is, a few times a second.
    """

    doing = "Building"
    purpose = "Building the shards"  # what needs space
    boundaries = BOUNDARY_POLICY
    trains_tokenizer = False
    result: type[BuiltT]

    def __init__(self, out: Path, seq_len: int, sharing: Sharing, say: Say, show: Show) -> None:
        self.out, self.seq_len, self.sharing, self.say, self.show = out, seq_len, sharing, say, show
        # What cannot be, before any work.
        require_folder(out)
        ShardSpec(seq_len, MAX_VOCABULARY, "", PACKING_VERSION, "")

    @abstractmethod
    def plan(self) -> Sequence[Unit]:
        """The units; called once, before anything else."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides the rows, apart from the tokenizer."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The tokenizer; where it is trained (`trains_tokenizer`), that takes its time."""

    def files(self) -> dict[str, bytes]:
        """Small files that lie beside the specification from the beginning, and what they hold."""
        return {}

    def difference(self, key: str, old: Any, new: Any) -> str:
        """How the folder's settings differ from these in `key`, for a person."""
        if key != "inputs" or old is None or new is None:
            before, now = (brief(value) if None in (old, new) else value for value in (old, new))
            return f"{key} was {before} and is now {now}"
        before, now = ({item["file"]: item["blake3"] for item in side} for side in (old, new))
        changed = [f"{name} ({'new' if name not in before else 'gone' if name not in now else 'other content'})"
                   for name in sorted({*before, *now}) if before.get(name) != now.get(name)]  # fmt: skip
        return f"the input files differ: {first_few(changed)}"

    @abstractmethod
    def needed_bytes(self, units: Sequence[Unit], spec: ShardSpec | None) -> int:
        """What the shards of these units take at most, about; before the folder is set up, without `spec`."""

    def before_units(self, units: Sequence[Unit], pending: Sequence[Unit]) -> str:
        """What is to be done before any of the `pending` units is built; a sentence about what keeps them from it."""
        return ""

    @abstractmethod
    def work(self, spec: ShardSpec, units: Sequence[Unit], threads: bool) -> UnitWork:
        """What builds these units; with `threads` a single process has all cores for itself."""

    def before_merge(self, units: Sequence[Unit]) -> None:
        """What is to be looked at when all units are finished; it raises DataError if they make no dataset."""

    @abstractmethod
    def merge(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> BuiltT:
        """The manifests of all units as that of the dataset (its `files` come later). Repeating it changes nothing.

        Raises:
            DataError: there is nothing in them.
        """

    def clear(self, units: Sequence[Unit]) -> None:
        """Delete what only the build needed; the dataset is finished."""


def build(job: Job[BuiltT]) -> BuiltT:
    """Build, or finish building, a dataset.

    Raises:
        DataError: unusable input, nothing to build, or a folder that belongs to something else.
        ConfigError: settings that cannot be, or an `out` that cannot be written to.
        DiskError: too little space.
    """
    out = job.out
    out.mkdir(parents=True, exist_ok=True)
    with access_errors(out, KEPT), held(out, job.sharing.is_array, job.say):
        if not (out / SPEC_FILE).is_file():
            with alone(out, job.say):  # so that nobody else is just setting it up
                require_ours(out)
        units = job.plan()
        spec = _settled(job, units)
        # After the specification: until that is there, only its companions tell the folder from somebody else's.
        (out / UNITS_FOLDER).mkdir(exist_ok=True)
        pending = [unit for unit in units if finished_unit(out, unit.name, spec.spec_hash) is None]
        kept = len(units) - len(pending)
        missing = _build_mine(job, spec, units, pending) if pending else ""
        if missing:
            return job.result(units=len(units), units_kept=kept, unfinished=missing)
        with alone(out, job.say):
            job.before_merge(units)
            merged = job.merge(spec, [_content(job, spec, unit) for unit in units])
            assert merged.manifest is not None
            manifest = finish_dataset(out, merged.manifest, [unit.name for unit in units])
            job.clear(units)
            remove_locks(out)
        return replace(merged, manifest=manifest, units=len(units), units_kept=kept)


def _build_mine(job: Job[BuiltT], spec: ShardSpec, units: Sequence[Unit], pending: Sequence[Unit]) -> str:
    """Build those of the pending units that are this task's; what is missing then, if anything is."""
    missing = job.before_units(units, pending)
    if missing:
        return missing
    mine, sharing = job.sharing.mine(pending), job.sharing
    if mine:
        require_free_space(job.out, job.needed_bytes(mine, spec), job.purpose)
        processes = min(sharing.workers, len(mine))
        # With one process for several cores the reference tokenizer's own threads use the others.
        work = job.work(spec, mine, processes == 1 and sharing.workers > 1)
        of = f" (task {sharing.task} of {sharing.tasks})" if sharing.is_array else ""
        job.say(f"{job.doing} {len(mine)} of {len(units)} units with {processes} process{'es' * (processes > 1)}{of}")
        progress = Progress(job.doing, len(mine), sum(unit.text_bytes for unit in mine))
        run_units(work, mine, sharing.workers, progress, job.show, patient=not sharing.is_array)
    left = [unit for unit in pending if finished_unit(job.out, unit.name, spec.spec_hash) is None]
    if not left:
        return ""
    assert sharing.tasks is not None, "a plain build waits for every unit"
    theirs = sorted({task_of(unit, sharing.tasks) for unit in left})
    return (
        f"{len(left)} of {len(units)} units are left to other tasks ({first_few([*map(str, theirs)], _TASKS_NAMED)}); "
        f"the last one finishes it all."
    )


def _content(job: Job[BuiltT], spec: ShardSpec, unit: Unit) -> dict[str, Any]:
    content = finished_unit(job.out, unit.name, spec.spec_hash)
    assert content is not None, f"unit {unit.name} vanished while its dataset was finished"
    return content


def merged_sources(contents: Iterable[Mapping[str, Any]], read: Callable[[Any], SourceT]) -> tuple[SourceT, ...]:
    """The sources of all units, each added up in the order of the units, by name."""
    sources: dict[str, Any] = {}
    for content in contents:
        for value in content["sources"]:
            name, source = value["name"], read(value)
            sources[name] = sources[name] + source if name in sources else source
    return tuple(sources[name] for name in sorted(sources))


def rows_manifest(spec: ShardSpec, inputs: tuple[InputFile, ...], sources: tuple[SourceInfo, ...]) -> DatasetManifest:
    """The manifest of a dataset of rows, still without its `files`."""
    return DatasetManifest(
        seq_len=spec.seq_len,
        vocab_size=spec.vocab_size,
        tokenizer_sha256=spec.tokenizer_sha256,
        spec_hash=spec.spec_hash,
        packing_version=spec.packing_version,
        inputs=inputs,
        sources=sources,
        boundaries=spec.boundaries,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The specification
# ---------------------------------------------------------------------------------------------------------------------


def _settled(job: Job[BuiltT], units: Sequence[Unit]) -> ShardSpec:
    """What all shards have in common; set up by the first run, compared by all later ones.

    Raises:
        DataError: the folder belongs to a build with another specification.
    """
    out = job.out
    if not (out / SPEC_FILE).is_file():
        with alone(out, job.say):
            if not (out / SPEC_FILE).is_file():  # or else another task did it meanwhile
                _set_up(job, units)
    old = read_stored(out / SPEC_FILE)
    _compare(job, {key: value for key, value in old.items() if key != "tokenizer_sha256"}, job.settings())
    _put_tokenizer(job, old)
    for name, content in job.files().items():  # lost, or the inputs lie elsewhere now
        if not (out / name).is_file() or (out / name).read_bytes() != content:
            with alone(out, job.say):
                write_atomic(out / name, content)
    return _shard_spec(job, old)


def _set_up(job: Job[BuiltT], units: Sequence[Unit]) -> None:
    """Put everything in place and write `build.json` last: from then on the folder is this build's."""
    require_free_space(job.out, job.needed_bytes(units, None), job.purpose)
    settings, tokenizer = job.settings(), job.tokenizer_json()
    spec = settings | {"tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    write_atomic(job.out / TOKENIZER_FILE, tokenizer)
    _shard_spec(job, spec)
    for name, content in job.files().items():
        write_atomic(job.out / name, content)
    write_json_atomic(job.out / SPEC_FILE, spec)


def _shard_spec(job: Job[BuiltT], spec: Mapping[str, Any]) -> ShardSpec:
    return ShardSpec(
        seq_len=job.seq_len,
        vocab_size=load_tokenizer(job.out / TOKENIZER_FILE).get_vocab_size(),
        tokenizer_sha256=spec["tokenizer_sha256"],
        packing_version=PACKING_VERSION,
        spec_hash=digest_json(spec),
        boundaries=job.boundaries,
    )


def _compare(job: Job[BuiltT], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differences = [job.difference(key, old.get(key), new.get(key)) for key in sorted({*old, *new})
                   if old.get(key) != new.get(key)]  # fmt: skip
    if differences:
        raise DataError(
            f"{job.out} was built with another specification: {'; '.join(differences)}. A dataset is never changed in "
            f"place: choose another --out, or delete the folder."
        )


def _put_tokenizer(job: Job[BuiltT], spec: Mapping[str, Any]) -> None:
    """Refuse another tokenizer than the folder's; put the folder's in place again if it was lost or damaged."""
    wanted = {"tokenizer_sha256": spec.get("tokenizer_sha256")}
    is_lost = stored_fingerprint(job.out) != wanted["tokenizer_sha256"]
    if job.trains_tokenizer and not is_lost:
        return
    if not is_lost:
        _compare(job, wanted, {"tokenizer_sha256": tokenizer_fingerprint(job.tokenizer_json())})
        return
    with alone(job.out, job.say):
        text = job.tokenizer_json()
        _compare(job, wanted, {"tokenizer_sha256": tokenizer_fingerprint(text)})
        write_atomic(job.out / TOKENIZER_FILE, text)


def brief(value: Any) -> str:
    """A setting that only one of two specifications has."""
    text = str(value)
    return text if len(text) <= _BRIEF_CHARACTERS else f"{text[:_BRIEF_CHARACTERS]}..."


def first_few(items: Sequence[str], count: int = _DIFFERENCES) -> str:
    return f"{', '.join(items[:count])}{', ...' if len(items) > count else ''}"
