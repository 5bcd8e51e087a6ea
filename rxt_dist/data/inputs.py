"""The files that a dataset was made of, as its manifest and its settings name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class InputFile:
    """A file that was read, so that a later build can tell whether it is still the same corpus.

    Either `blake3` of the whole file (interactions), or `fingerprint`, a hash of blocks all over it.
    """

    file: str
    bytes: int
    blake3: str | None = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without the one that is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_spec(self) -> dict[str, Any]:
        """As it stands in build.json. The name of the hash is as old as the format: its digest is in every shard."""
        return {"file": self.file, "bytes": self.bytes, "blake3": self.blake3 or self.fingerprint}

    @staticmethod
    def of_manifest(value: Mapping[str, Any], documents: bool) -> InputFile:
        """The inverse of `to_dict`; older manifests of `documents` call the fingerprint blake3."""
        if documents and "blake3" in value:
            return InputFile(value["file"], value["bytes"], fingerprint=value["blake3"])
        return InputFile(**value)
