"""A small dataset of every kind, from inputs that never change, and the digests that it has always had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import golden_inputs
import pytest

from data_prep.building.builder import Built
from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.interactions import build as interactions
from data_prep.megatron import importing
from data_prep.shards.repack import RepackRequest, repack
from rxt_dist.config.clean import CleanConfig, NearDuplicateConfig
from rxt_dist.config.corpus import BuildConfig, SourceConfig

# Of each dataset the root digest, and that of its other files; the beginnings of both. Who changes one of them says to
# everybody with a dataset that it cannot be built again.
DIGESTS = {
    "documents": ("bb8ddb4c1f4b6a84", "6b4d5141adb76188"),
    "cleaned": ("50731872ee772e93", "c70742d2c02be6f3"),
    "single": ("49a3ca8965e90cf6", "57e471d0d37ec824"),
    "alpha": ("5f12eede08c9e685", "2627b1d598174cee"),
    "dialogues": ("7fda41ac27ad72c6", "22cfc06430dd1a32"),
    "several turns": ("3b254aeb3ffb61be", "87954e0145cfb183"),
    "recalls": ("15d6c00888d3dc20", "99611687ec80a946"),
    "repacked": ("90be6d9daf7077fe", "ec140ac0d620a123"),
    "imported": ("3eedf42694d73445", "a8bf528fad3eedc9"),
}
_INTERACTIONS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single", "skip_other_kinds": True},
    "alpha": {"kind": "single", "skip_other_kinds": True, "template": "alpha"},
    "dialogues": {"kind": "dialogues"},
    "several turns": {"kind": "dialogues", "skip_other_kinds": True},
    "recalls": {"kind": "dialogues"},
}


def write_inputs(place: Path) -> None:
    """All that the jobs read, and the dataset that is packed again."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    golden_inputs.write_texts(place / "texts")
    golden_inputs.write_chats(place / "chats")
    golden_inputs.write_recalls(place / "recalls")
    golden_inputs.write_megatron(place / "corpus")
    run("documents", place, place / "first")


def run(kind: str, place: Path, out: Path, say: Any = lambda line: None, **sharing: Any) -> Built:
    """Build a dataset of a kind, in several units; in one process unless `sharing` (workers, task, tasks) says else."""
    tokenizer = place / "tokenizer.json"
    sharing = {"workers": 1} | sharing
    with _small_units():
        if kind in _INTERACTIONS:
            options = {"eval_fraction": 0.1, **_INTERACTIONS[kind], **sharing}
            records = place / ("recalls" if kind == "recalls" else "chats")
            request = interactions.InteractionRequest((records,), out, tokenizer, 128, **options)
            return interactions.build_interactions(request, say)
        if kind == "repacked":
            return repack(RepackRequest(place / "first", out, 150, **sharing), say)
        if kind == "imported":
            options = {"eval_fraction": 0.1, **sharing}
            return importing.import_megatron(
                importing.ImportRequest(place / "corpus", out, tokenizer, 64, "en", "web", **options), say
            )
        options = {"eval_fraction": 0.1, "backend": "tokenizers", **sharing}
        if kind == "documents":
            options |= {"inputs": (place / "texts",), "seq_len": 64, "unit_bytes": 12_000}
        else:
            options |= {"inputs": (), "seq_len": 100, "config": _cleaned(place)}
        return build_dataset(BuildRequest(out=out, tokenizer=tokenizer, **options), say)


def _cleaned(place: Path) -> BuildConfig:
    clean = CleanConfig(min_characters=20, exact_duplicates=True, near_duplicates=NearDuplicateConfig())
    sources = (
        SourceConfig(name="tales", inputs=(str(place / "texts/en"),), language="en"),
        SourceConfig(name="rest", inputs=(str(place / "texts/pl"), str(place / "texts/mixed.jsonl"))),
    )
    return BuildConfig(sources=sources, clean=clean, unit_mb=0.02)


@contextmanager
def _small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "_UNIT_BYTES", 6_000)
        patch.setattr(importing, "_UNIT_BYTES", 6_000)
        yield
