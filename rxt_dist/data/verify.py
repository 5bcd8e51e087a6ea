"""Is a dataset folder what its manifest says? Every file of it is vouched for, bit by bit.

`dataset.json` is sealed by a digest of its own content and states size and hash of every other file; `spare.zip` must
be the archive that the small files give. Rows (of documents or single interactions) and dialogues are checked alike; of
dialogues there are no checksums of rows. Hashing runs in threads (blake3 and reading leave the interpreter free).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa

from rxt_dist.data.dialogues import (
    AnyManifest,
    DialogueManifest,
    DialogueShard,
    load_any_manifest,
    manifest_of,
    unsealed_manifest,
)
from rxt_dist.data.manifest import (
    DATASET_FILE,
    SHARD_SUFFIX,
    SPLITS,
    TOKENIZER_FILE,
    ShardInfo,
    sums_file,
    tokenizer_fingerprint,
)
from rxt_dist.data.origin import mending
from rxt_dist.data.sealing import SPARE_FILE, hash_bytes, is_sealed, read_spare, small_files, spare_bytes
from rxt_dist.data.writer import record_batch_offsets
from rxt_dist.errors import DataError

_BLOCK = 1 << 22
SUM_BYTES = 8
_CONTENT = "does not have the content its manifest states (blake3 differs: a flipped bit or another file)"

OnBytes = Callable[[int], None]
AnyShard = ShardInfo | DialogueShard
_Content = tuple[bytes | None, str]


@dataclass(frozen=True)
class Finding:
    """A damaged file, by its name in the dataset folder, and what is wrong with it."""

    file: str
    problem: str


@dataclass(frozen=True)
class Report:
    """What a look at a dataset found. `manifest` is None where neither `dataset.json` nor its spare copy can be read;
    `unknown` are files that the manifest does not know (no damage: nothing reads them). `unsealed` is a dataset of
    dialogues that an earlier version finished: nothing vouches for its small files but the tokenizer."""

    manifest: AnyManifest | None
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]
    files: int
    bytes: int
    unsealed: bool = False


def verify_quick(root: Path) -> Report:
    """Everything but the content of the shards: seconds for a thousand of them.

    Raises:
        DataError: there is no dataset.
    """

    def check(info: AnyShard, on_bytes: OnBytes) -> str | None:
        return size_problem(root / info.file, info.bytes)

    return _verify(root, _threads(), check, lambda done, total: None)


def verify_full(
    root: Path,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Hash every byte of every file, and compare the shards' structure with the offsets that training reads by.

    Args:
        threads: files hashed at once; None: one a core, at most eight.
        progress: told bytes done and in all.

    Raises:
        DataError: there is no dataset.
    """
    return _verify(
        root, threads or _threads(), lambda info, on_bytes: shard_problem(root / info.file, info, on_bytes), progress
    )


def _threads() -> int:
    return min(os.cpu_count() or 1, 8)


def size_problem(path: str | Path, wanted: int) -> str | None:
    """What a look at the directory says is wrong with a file of `wanted` bytes, or None."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if size == wanted else f"has {size:,} bytes instead of {wanted:,} (truncated or overwritten)"


def shard_problem(path: Path, info: AnyShard, on_bytes: OnBytes = lambda size: None) -> str | None:
    """What is wrong with a shard's size, content or structure, or None. Reads the whole file."""
    problem = size_problem(path, info.bytes)
    if problem:
        return problem
    try:
        if _hash_file(path, on_bytes) != info.blake3:
            return _CONTENT
        if isinstance(info, DialogueShard):
            if (rows := _count_rows(path)) != info.dialogues:
                return f"holds {rows:,} dialogues instead of {info.dialogues:,}"
        elif record_batch_offsets(path) != info.batches:
            return "does not have its record batches where its manifest states"
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None


def _count_rows(path: Path) -> int:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))


def _verify(
    root: Path,
    threads: int,
    check_shard: Callable[[AnyShard, OnBytes], str | None],
    progress: Callable[[int, int], None],
) -> Report:
    manifest, findings = _manifest(root)
    if manifest is None:
        return Report(None, tuple(findings), (), 1, 0)
    unsealed = isinstance(manifest, DialogueManifest) and not manifest.files
    contents = {item.file: _content(root / item.file) for item in manifest.files}
    if unsealed:
        findings += _tokenizer_findings(manifest, _content(root / TOKENIZER_FILE))
    else:
        findings += _small_findings(root, manifest, contents)
    findings += _unit_findings(manifest, contents, {finding.file for finding in findings})
    shards: list[AnyShard] = list(manifest.shards())
    total, done, lock = sum(shard.bytes for shard in shards), 0, threading.Lock()

    def on_bytes(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    def check(info: AnyShard) -> list[Finding]:
        problems = [(info.file, check_shard(info, on_bytes))]
        if isinstance(info, ShardInfo):
            sums = sums_file(info.file)
            problems.append((sums, sums_problem(root / sums, info)))
        return [Finding(file, problem) for file, problem in problems if problem]

    with ThreadPoolExecutor(threads) as pool:
        # Shards first in the manifest may be few and large ones last: the largest are begun first.
        for found in pool.map(check, sorted(shards, key=lambda shard: -shard.bytes)):
            findings += found
    with_sums = [shard for shard in shards if isinstance(shard, ShardInfo)]
    size = total + sum(SUM_BYTES * shard.rows for shard in with_sums) + sum(item.bytes for item in manifest.files)
    files = len(shards) + len(with_sums) + len(manifest.files) + 2
    unknown = () if unsealed else _unknown(root, manifest)
    return Report(manifest, tuple(sorted(findings, key=lambda finding: finding.file)), unknown, files, size, unsealed)


def _unknown(root: Path, manifest: AnyManifest) -> tuple[str, ...]:
    """Files of the folder that are not the dataset's."""
    known = {item.file for item in manifest.files} | {shard.file for shard in manifest.shards()}
    present = small_files(root) + [path.relative_to(root).as_posix() for path in root.rglob(f"*{SHARD_SUFFIX}")]
    return tuple(sorted(name for name in present if name not in known and "/." not in f"/{name}"))


def _manifest(root: Path) -> tuple[AnyManifest | None, list[Finding]]:
    """The manifest, from its spare copy where `dataset.json` is damaged, and what is wrong with `dataset.json`."""
    text, problem = _content(root / DATASET_FILE)
    copy = read_spare(root).get(DATASET_FILE)
    spare = _sealed_manifest(copy)
    if text is not None and is_sealed(text):
        manifest = load_any_manifest(root)
        if spare is None or not _replaces(root, spare, manifest):
            return manifest, []
        problem = f"is older than its copy in {SPARE_FILE}, which the other files match: a build ended between the two"
        return spare, [Finding(DATASET_FILE, problem)]
    if text is not None and copy is None and (earlier := unsealed_manifest(text)):
        return earlier, []
    if text is None and copy is None:
        load_any_manifest(root)  # says why it cannot be read and what to do
    problem = problem or "does not have the digest that it states (damaged or edited)"
    if spare is None:
        return None, [Finding(DATASET_FILE, problem), Finding(SPARE_FILE, "holds no sound copy of the manifest")]
    return spare, [Finding(DATASET_FILE, problem)]


def _replaces(root: Path, spare: AnyManifest, manifest: AnyManifest) -> bool:
    """Whether a build that changed small files, and no row, ended between `spare.zip` and `dataset.json`."""
    if spare == manifest or spare.root_digest != manifest.root_digest:
        return False
    contents = ((item, _content(root / item.file)[0]) for item in spare.files)
    return all(content is not None and hash_bytes(content) == item.blake3 for item, content in contents)


def _sealed_manifest(text: bytes | None) -> AnyManifest | None:
    return manifest_of(text) if text is not None and is_sealed(text) else None


def _small_findings(root: Path, manifest: AnyManifest, contents: Mapping[str, _Content]) -> Iterator[Finding]:
    """Small files, the tokenizer's fingerprint, and the archive of spare copies."""
    for item in manifest.files:
        content, problem = contents[item.file]
        if content is None:
            yield Finding(item.file, problem)
        elif hash_bytes(content) != item.blake3:
            yield Finding(item.file, _CONTENT)
        elif item.file == TOKENIZER_FILE:
            yield from _tokenizer_findings(manifest, (content, problem))
    if TOKENIZER_FILE not in contents:
        yield Finding(TOKENIZER_FILE, "is missing")
    spare, problem = _content(root / SPARE_FILE)
    if spare is None or spare != expected_spare(root, manifest):
        yield Finding(SPARE_FILE, problem or "does not hold exact copies of the small files")


def _tokenizer_findings(manifest: AnyManifest, tokenizer: _Content) -> Iterator[Finding]:
    content, problem = tokenizer
    if content is None:
        yield Finding(TOKENIZER_FILE, problem)
        return
    try:
        made_with = tokenizer_fingerprint(content.decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(TOKENIZER_FILE, f"cannot be read as a tokenizer ({error})")
        return
    if made_with != manifest.tokenizer_sha256:
        yield Finding(TOKENIZER_FILE, "is not the tokenizer that made the shards")


def expected_spare(root: Path, manifest: AnyManifest) -> bytes | None:
    """The archive that this manifest and sound small files give; None where one of them is lost in both places."""
    spare = read_spare(root)
    texts = (_content(root / DATASET_FILE)[0], spare.get(DATASET_FILE))
    text = next((text for text in texts if text is not None and _sealed_manifest(text) == manifest), None)
    if text is None:
        return None
    sound = {DATASET_FILE: text}
    for item in manifest.files:
        for content in (_content(root / item.file)[0], spare.get(item.file)):
            if content is not None and hash_bytes(content) == item.blake3:
                sound[item.file] = content
        if item.file not in sound:
            return None
    return spare_bytes(sound)


def _unit_findings(manifest: AnyManifest, contents: Mapping[str, _Content], damaged: set[str]) -> Iterator[Finding]:
    """Units whose manifests, each sound by itself, name other shards than `dataset.json`."""
    known: dict[str, AnyShard] = {shard.file: shard for shard in manifest.shards()}
    read: Callable[[Any], AnyShard] = (
        DialogueShard.from_dict if isinstance(manifest, DialogueManifest) else ShardInfo.from_dict
    )
    for name, (content, _) in contents.items():
        if content is None or name in damaged or not name.startswith("units/") or not name.endswith(".json"):
            continue
        sources = json.loads(content).get("sources", [])
        shards = [shard for source in sources for split in SPLITS for shard in source[split]["shards"]]
        strange = [shard["file"] for shard in shards if known.get(shard["file"]) != read(shard)]
        if strange:
            yield Finding(name, f"and {DATASET_FILE} disagree about {', '.join(strange[:3])}")


def sums_problem(path: Path, info: ShardInfo) -> str | None:
    """What is wrong with a shard's file of row checksums, or None. Reads the file: 8 bytes a row."""
    problem = size_problem(path, SUM_BYTES * info.rows)
    if problem:
        return problem
    try:
        return None if _hash_file(path, lambda size: None) == info.row_sums_blake3 else _CONTENT
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _content(path: Path) -> _Content:
    """What a small file holds, or why that cannot be read (else "")."""
    try:
        return path.read_bytes(), ""
    except FileNotFoundError:
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"


def _hash_file(path: Path, on_bytes: OnBytes) -> str:
    digest = blake3.blake3()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return str(digest.hexdigest())


def require_sound(report: Report, root: Path) -> None:
    """Raise DataError naming what is damaged, if anything is."""
    if not report.findings:
        return
    files = "; ".join(f"{finding.file} {finding.problem}" for finding in report.findings[:8])
    more = f"; and {len(report.findings) - 8} more" if len(report.findings) > 8 else ""
    raise DataError(
        f"{root} has {len(report.findings)} damaged file{'s' * (len(report.findings) > 1)}: {files}{more}. "
        f"{mending(root)}"
    )
