"""The survey of a unit: what de-duplication needs to know of its documents, on disk, so that no text is held or read
twice.

Near-duplicates are estimated by MinHash over runs of 5 words. The signatures come from rensa (R-MinHash). Compared with
datasketch 2.0, the other well-kept library, on 2,000 documents of about 310 words and 128 permutations (one core):
rensa 9 us a document with the copy into numpy, datasketch 148 us (affine32, its fastest; 617 us legacy); both
estimate without bias at the standard error that theory gives. rensa's signatures are the same for each of its
processor kernels and name the version of their algorithm; it stands in every survey, and a test pins a signature, so
that a release which changes them can neither mix with older surveys nor pass unnoticed.

A signature is kept as 16 bits a value (two different values agree by chance once in 65,536) and compared in
duplicates.py only with those that share a band, a hash of some consecutive values, or are joined by such ones. A
survey takes about 400 bytes a document with the defaults, 22 without near-duplicates.

    <arrays, each from a multiple of 64 bytes on> <JSON: where the arrays are, spec, sources> <its length, 8 bytes>
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.shingles import Hashes, hash_shingles, hash_words
from data_prep.corpora import Document, ReadCounts, read_unit
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig, NearDuplicateConfig
from rxt_dist.data.manifest import digest_json
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import fsync_dir, temporary_path

FOLDER = "duplicates"

_VERSION = 1
_SEED = 1
_GROUP_BYTES = 1 << 17
_ALIGN = 64
_BAND_DOCUMENTS = 4096
# Of pairs exactly at the threshold this many share a band; more similar ones practically always do.
_RECALL = 0.9


def require_library(config: CleanConfig) -> None:
    """Raise ConfigError if the configuration asks for near-duplicates and rensa is not installed."""
    if config.near_duplicates is not None and importlib.util.find_spec("rensa") is None:
        raise ConfigError(
            "clean.near_duplicates needs the package rensa, which is not installed. Run `pip install "
            "'rensa>=0.5,<0.6'`, or set near_duplicates to null."
        )


def bands_and_rows(config: NearDuplicateConfig) -> tuple[int, int]:
    """How a signature is cut: as many rows a band as still let 90 % of the pairs at the threshold share a band.

    Two texts of similarity s share one of b bands of r rows with probability 1 - (1 - s^r)^b. Every candidate is
    compared afterwards, so that too many of them cost time only.
    """
    for rows in range(config.permutations, 1, -1):
        bands = config.permutations // rows
        if 1 - (1 - config.threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return config.permutations, 1


def survey_spec(unit: Unit, config: CleanConfig) -> str:
    """Digest of all that decides a survey: the unit's inputs, the filters, and the versions of what computes it."""
    algorithm = None
    if config.near_duplicates is not None:
        algorithm = importlib.import_module("rensa").RMinHash.ALGORITHM_VERSION
    parts = [
        [part.input.name, part.input.source, part.input.fingerprint, part.start, part.stop] for part in unit.slices
    ]
    return digest_json(
        {
            "version": _VERSION,
            "unit": unit.name,
            "slices": parts,
            "clean": config.model_dump(mode="json"),
            "rensa": algorithm,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """A survey on disk; columns are read one at a time.

    N documents, those that pass the filters: `ordinal` uint32 [N] in the unit, `source` uint16 [N], an index into
    `sources`, `text` uint64 [N, 2], a 128-bit hash of the normalised text, and with near-duplicates `band` uint64
    [B, N] and `signature` uint16 [N, P].
    """

    path: Path
    spec: str
    sources: tuple[str, ...]
    columns: dict[str, tuple[int, str, tuple[int, ...]]]

    @property
    def documents(self) -> int:
        return self.columns["ordinal"][2][0]

    def read(self, column: str) -> npt.NDArray[Any]:
        """A whole column."""
        offset, kind, shape = self.columns[column]
        return np.fromfile(self.path, kind, int(np.prod(shape)), offset=offset).reshape(shape)

    def read_band(self, band: int) -> Hashes:
        """The keys [N] of one band."""
        offset, kind, (_, rows) = self.columns["band"]
        return np.fromfile(self.path, kind, rows, offset=offset + 8 * rows * band)

    def signatures(self) -> npt.NDArray[np.uint16]:
        """All signatures, mapped and not read."""
        offset, kind, shape = self.columns["signature"]
        return np.memmap(self.path, kind, "r", offset, shape) if shape[0] else np.empty(shape, dtype=kind)


def survey_path(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.survey"


def open_survey(out: Path, unit: Unit, config: CleanConfig) -> Survey | None:
    """The finished survey of a unit under this configuration, or None."""
    path = survey_path(out, unit.name)
    try:
        with open(path, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(end - length)
            footer = json.loads(file.read(length))
        columns = {name: (offset, kind, tuple(shape)) for name, (offset, kind, shape) in footer["columns"].items()}
        survey = Survey(path, footer["spec"], tuple(footer["sources"]), columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return survey if survey.spec == survey_spec(unit, config) else None


def survey_unit(out: Path, unit: Unit, config: CleanConfig, report: Callable[[int], None] = lambda done: None) -> None:
    """Write `out/duplicates/<unit>.survey`, unless it is there. Filters come first: what they drop is not compared.

    Args:
        report: told, from time to time, how many more bytes of text have been read.

    Raises:
        ConfigError: rensa is needed and not installed.
        DataError: an input that cannot be read.
    """
    require_library(config)
    if open_survey(out, unit, config) is not None:
        return
    path = survey_path(out, unit.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        _write(temporary, unit, config, report)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _write(path: Path, unit: Unit, config: CleanConfig, report: Callable[[int], None]) -> None:
    """Signatures go to the file while the unit is read; held in memory are the other columns, 22 bytes a document."""
    near = config.near_duplicates
    sources: dict[str, int] = {}
    parts: dict[str, list[npt.NDArray[Any]]] = {"ordinal": [], "source": [], "text": []}
    written = 0
    with open(path, "wb") as file:
        for ordinals, documents, size in _groups(unit, config):
            numbers = [sources.setdefault(document.source, len(sources)) for document in documents]
            digests = b"".join(blake3(document.text.encode()).digest()[:16] for document in documents)
            parts["ordinal"].append(np.array(ordinals, dtype="<u4"))
            parts["source"].append(np.array(numbers, dtype="<u2"))
            parts["text"].append(np.frombuffer(digests, dtype="<u8").reshape(-1, 2))
            if near is not None and documents:
                file.write(minhash([document.text for document in documents], near).tobytes())
            written += len(documents)
            report(size)
        columns: dict[str, tuple[int, str, tuple[int, ...]]] = {}
        if near is not None:
            columns["signature"] = (0, "<u2", (written, near.permutations))
        for (name, arrays), empty in zip(parts.items(), _EMPTY, strict=True):
            array = np.concatenate([empty, *arrays])
            columns[name] = (_align(file), array.dtype.str, array.shape)
            file.write(array.tobytes())
        if near is not None:
            columns["band"] = (_align(file), "<u8", (bands_and_rows(near)[0], written))
            _write_bands(file, columns["band"], Survey(path, "", (), columns), near)
        value = {"columns": columns, "sources": list(sources), "spec": survey_spec(unit, config)}
        footer = json.dumps(value).encode()
        file.write(footer + len(footer).to_bytes(8, "little"))
        file.flush()
        os.fsync(file.fileno())


_EMPTY = (np.empty(0, "<u4"), np.empty(0, "<u2"), np.empty((0, 2), "<u8"))


def _align(file: io.BufferedWriter) -> int:
    """Fill up to the next multiple of 64 bytes, and return where that is."""
    file.write(bytes(-file.tell() % _ALIGN))
    return file.tell()


def _write_bands(
    file: io.BufferedWriter, place: tuple[int, str, tuple[int, ...]], survey: Survey, config: NearDuplicateConfig
) -> None:
    """Band after band, as they are read; computed from the signatures, of which some thousand are in memory."""
    offset, kind, (bands, documents) = place
    file.flush()
    if bands * documents:
        # Room is taken now: a full disk would be a signal, and no error, where the map is written to.
        os.posix_fallocate(file.fileno(), offset, 8 * bands * documents)
    if documents:
        signatures = survey.signatures()
        keys = np.memmap(survey.path, kind, "r+", offset, (bands, documents))
        for start in range(0, documents, _BAND_DOCUMENTS):
            part = slice(start, start + _BAND_DOCUMENTS)
            keys[:, part] = band_keys(np.asarray(signatures[part]), config)
        keys.flush()
    file.seek(0, os.SEEK_END)


def _groups(unit: Unit, config: CleanConfig) -> Iterator[tuple[list[int], list[Document], int]]:
    """Documents that pass the filters with their ordinals, in groups of about 128 KB of what was read, and the bytes of
    text that were read for the group."""
    cleaner = Cleaner(config)
    ordinals: list[int] = []
    documents: list[Document] = []
    size = 0
    for ordinal, document in enumerate(read_unit(unit, ReadCounts())):
        size += len(document.text.encode())
        cleaned = cleaner.clean(document)
        if not isinstance(cleaned, str):
            ordinals.append(ordinal)
            documents.append(cleaned)
        if size >= _GROUP_BYTES:
            yield ordinals, documents, size
            ordinals, documents, size = [], [], 0
    yield ordinals, documents, size


# ---------------------------------------------------------------------------------------------------------------------
# MinHash
# ---------------------------------------------------------------------------------------------------------------------


def shingles(texts: list[str], length: int) -> tuple[Hashes, npt.NDArray[np.uint64]]:
    """Hashes of all runs of `length` words of N texts, letters in lower case, and their bounds [N + 1].

    A shorter text is one run; a text without any word is its own hash, so that such texts are not all alike.
    """
    words, bounds = hash_words([text.lower() for text in texts])
    parts = []
    for index, text in enumerate(texts):
        own = words[bounds[index] : bounds[index + 1]]
        if not len(own):
            own = np.frombuffer(blake3(text.encode()).digest()[:8], dtype="<u8")
        parts.append(hash_shingles(own, min(length, len(own))))
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.uint64)


def minhash(texts: list[str], config: NearDuplicateConfig) -> npt.NDArray[np.uint16]:
    """Signatures uint16 [N, permutations]; the share of equal values estimates the similarity of two texts."""
    rensa = importlib.import_module("rensa")
    runs, bounds = shingles(texts, config.shingle_words)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(runs, bounds, config.permutations, _SEED)
    values = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), config.permutations)
    return ((values * np.uint32(0x9E3779B1)) >> np.uint32(16)).astype("<u2")


def band_keys(signatures: npt.NDArray[np.uint16], config: NearDuplicateConfig) -> Hashes:
    """The keys uint64 [bands, N] of N signatures; texts that share a key are compared."""
    bands, rows = bands_and_rows(config)
    cut = signatures[:, : bands * rows].reshape(len(signatures), bands, rows)
    keys = np.zeros((len(signatures), bands), dtype=np.uint64)
    for row in range(rows):
        keys = (keys + cut[:, :, row] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys.T


def require_surveys(out: Path, units: list[Unit], config: CleanConfig) -> list[Survey]:
    """The surveys of all units, in their order.

    Raises:
        DataError: some are missing.
    """
    surveys = [open_survey(out, unit, config) for unit in units]
    missing = [unit.name for unit, survey in zip(units, surveys, strict=True) if survey is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(units)} units in {out} have not been searched for duplicates ({missing[0]} is the "
            f"first). Run the same `rxt-dist data build` until all its tasks have finished this phase."
        )
    return [survey for survey in surveys if survey is not None]
