"""What a pair of .bin and .idx cannot say of itself, in `PREFIX.rxt.json` beside it: source, language, tokenizer.

An export writes it and an import reads it. It states sizes and hashes of its pair, so that it is never believed about
another one, and seals itself with a digest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_prep.languages import UNKNOWN, language_of_name
from data_prep.megatron.corpus import pair_of, plain_prefix
from data_prep.units import fingerprint_file
from rxt_dist.data.sealing import is_sealed, sealed_json
from rxt_dist.errors import DataError

DESCRIPTION_SUFFIX = ".rxt.json"
_FORMAT, _VERSION = "rxt-megatron-export", 1


@dataclass(frozen=True)
class Description:
    """Where the documents of a pair come from; `dataset` is the root digest of the dataset that was exported."""

    source: str
    language: str
    split: str
    tokenizer_sha256: str
    dataset: str


def description_file(prefix: Path) -> Path:
    plain = plain_prefix(prefix)
    return plain.with_name(plain.name + DESCRIPTION_SUFFIX)


def description_of(description: Description, bin_file: Path, idx_file: Path) -> bytes:
    """The content of the file; the pair need not have its final name yet."""
    files = {name: _stated(path) for name, path in (("bin", bin_file), ("idx", idx_file))}
    return sealed_json({"format": _FORMAT, "version": _VERSION, **asdict(description), "files": files})


def read_description(prefix: Path) -> Description | None:
    """What is known of a pair; None where no export of this program has described it.

    Raises:
        DataError: the file is damaged, of another version, or describes another pair.
    """
    path = description_file(prefix)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). Mend its rights, or what is wrong there."
        ) from error
    advice = "Copy all three files of the export again, or delete this one and give --source and --language yourself."
    if not is_sealed(text):
        raise DataError(f"{path} is damaged or was edited: it does not have the digest that it states. {advice}")
    value = json.loads(text)
    if (value.get("format"), value.get("version")) != (_FORMAT, _VERSION):
        raise DataError(
            f"{path} has format {value.get('format')!r} version {value.get('version')!r}; this program reads "
            f"{_FORMAT!r} version {_VERSION}. {advice}"
        )
    for name, file in zip(("bin", "idx"), pair_of(prefix), strict=True):
        # Of a file that is missing the import says so.
        if file.is_file() and value["files"][name] != _stated(file):
            raise DataError(f"{path} does not describe {file.name}, which has another content. {advice}")
    return Description(**{name: value[name] for name in Description.__dataclass_fields__})


@dataclass(frozen=True)
class Naming:
    """What an import calls its documents, and `said`: how that is known, in a sentence."""

    source: str
    language: str
    said: str


def name_documents(prefix: Path, source: str | None, language: str | None) -> Naming:
    """Source and language as given, else as the export states them, else as far as the name of the pair tells.

    Raises:
        DataError: as `read_description`.
    """
    about = read_description(prefix)
    plain = plain_prefix(prefix)
    if about is not None:
        naming = Naming(source or about.source, language or about.language, "")
        stated = f"{description_file(prefix).name}: {about.split} of source {about.source} ({about.language})"
        is_other = (naming.source, naming.language) != (about.source, about.language)
        taken = f", taken as {naming.source} ({naming.language}) as asked for" if is_other else ""
        return replace(naming, said=f"{stated}, exported from a dataset with digest {about.dataset[:16]}{taken}.")
    if language is not None:
        return Naming(source or language, language, "")
    found = language_of_name(f"{plain.parent.name}/{plain.name}.bin")
    if found:
        return Naming(source or found, found, f"No --language given: {found}, after the name of {plain}.")
    said = (
        f"Nothing says which language {plain} is in: taken as {UNKNOWN}. Name it with --language, and the source with "
        f"--source, as mixtures and evaluation go by them."
    )
    return Naming(source or UNKNOWN, UNKNOWN, said)


def _stated(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "fingerprint": fingerprint_file(path)}
