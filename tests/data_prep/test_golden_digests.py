"""Datasets of every kind come out as they did before: their digests are stored, of rows and of all small files.

Who changes one of these numbers says to everybody with a dataset that it cannot be built again.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import golden_inputs
import pytest

from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.interactions import build as interactions
from data_prep.megatron import importing
from data_prep.shards.repack import RepackRequest, repack
from rxt_dist.config.clean import CleanConfig, NearDuplicateConfig
from rxt_dist.config.corpus import BuildConfig, SourceConfig
from rxt_dist.data.verify import verify_full

# Of each dataset the root digest, and that of its other files; the beginnings of both.
GOLDEN = {
    "documents": ("bb8ddb4c1f4b6a84", "6b4d5141adb76188"),
    "cleaned": ("50731872ee772e93", "c70742d2c02be6f3"),
    "single": ("49a3ca8965e90cf6", "57e471d0d37ec824"),
    "alpha": ("5f12eede08c9e685", "2627b1d598174cee"),
    "dialogues": ("7fda41ac27ad72c6", "22cfc06430dd1a32"),
    "several turns": ("3b254aeb3ffb61be", "87954e0145cfb183"),
    "repacked": ("90be6d9daf7077fe", "ec140ac0d620a123"),
    "imported": ("3eedf42694d73445", "a8bf528fad3eedc9"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and the datasets of documents, which others are made from."""
    root = tmp_path_factory.mktemp("golden")
    (root / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    golden_inputs.write_texts(root / "texts")
    golden_inputs.write_chats(root / "chats")
    golden_inputs.write_megatron(root / "corpus")
    return root


def digests(root: Path) -> tuple[str, str]:
    """Root digest, and one of all other files but those that name places."""
    manifest = json.loads((root / "dataset.json").read_bytes())
    rest = {key: value for key, value in manifest.items() if key not in ("files", "digest")}
    found = {"dataset.json": json.dumps(rest, sort_keys=True)}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        named = name not in ("dataset.json", "spare.zip", "plan.json", "origin.json") and "/." not in f"/{name}"
        if path.is_file() and named:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert verify_full(root).findings == ()
    return manifest["root_digest"][:16], hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def build_documents(place: Path, out: str, config: BuildConfig, **options: object) -> Path:
    inputs = () if config.sources else (place / "texts",)
    fields = {"seq_len": 64, "eval_fraction": 0.1, "workers": 1, "backend": "tokenizers"} | options
    build_dataset(BuildRequest(inputs, place / out, place / "tokenizer.json", config=config, **fields))
    return place / out


def test_documents_of_all_containers(place: Path) -> None:
    root = build_documents(place, "documents", BuildConfig(), unit_bytes=12_000)
    assert len(list((root / "units").glob("*.json"))) >= 4
    assert digests(root) == GOLDEN["documents"]


def test_documents_of_sources_cleaned(place: Path) -> None:
    if find_spec("rensa") is None:
        pytest.skip("near-duplicates need the extra `dedup`")
    clean = CleanConfig(min_characters=20, exact_duplicates=True, near_duplicates=NearDuplicateConfig())
    sources = (
        SourceConfig(name="tales", inputs=(str(place / "texts/en"),), language="en"),
        SourceConfig(name="rest", inputs=(str(place / "texts/pl"), str(place / "texts/mixed.jsonl"))),
    )
    root = build_documents(place, "cleaned", BuildConfig(sources=sources, clean=clean, unit_mb=0.02), seq_len=100)
    assert json.loads((root / "clean.json").read_text())["dropped"].keys() == {
        "exact_duplicate",
        "near_duplicate",
        "too_short",
    }
    assert digests(root) == GOLDEN["cleaned"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("single", {"kind": "single", "skip_other_kinds": True}),
        ("alpha", {"kind": "single", "skip_other_kinds": True, "template": "alpha"}),
        ("dialogues", {"kind": "dialogues"}),
        ("several turns", {"kind": "dialogues", "skip_other_kinds": True}),
    ],
)
def test_interactions(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, object]) -> None:
    monkeypatch.setattr(interactions, "_UNIT_BYTES", 6_000)
    interactions.build_interactions(
        interactions.InteractionRequest(
            (place / "chats",), place / name, place / "tokenizer.json", 128, eval_fraction=0.1, **options
        )
    )
    assert len(list((place / name / "units").glob("*.json"))) >= 3
    assert digests(place / name) == GOLDEN[name]


def test_repacked_documents(place: Path) -> None:
    first = build_documents(place, "first", BuildConfig(), unit_bytes=12_000)
    repack(RepackRequest(first, place / "repacked", 150, workers=1))
    assert digests(place / "repacked") == GOLDEN["repacked"]


def test_imported_documents(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_UNIT_BYTES", 6_000)
    importing.import_megatron(
        importing.ImportRequest(
            place / "corpus", place / "imported", place / "tokenizer.json", 64, "en", "web", eval_fraction=0.1
        )
    )
    assert len(list((place / "imported/units").glob("*.json"))) >= 3
    assert digests(place / "imported") == GOLDEN["imported"]
