"""Dialogues for the memory stages: turns that belong together, read one after another while the memory is written.

A dataset of dialogues is a folder like that of documents, with another kind of shard: a row of its Arrow files is one
dialogue, `tokens: large_list<uint16>` (all turns, one after another, each an interaction of `interactions.py`) and
`turn_len: large_list<uint16>` (their lengths). A shard in which a dialogue recalls what it was told has a third column,
`recall: large_list<uint16>`, three numbers a turn: how many turns before the value was told, the first token of the
turn that holds it and the end of these; zeros where a turn recalls nothing. Such sets are small, so rows are read
through Arrow; each shard is hashed when it is first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rxt_dist.data.interactions import NO_LOSS, answer_labels, are_system_prompts, check_interactions
from rxt_dist.data.manifest import (
    DATASET_FILE,
    Counts,
    DatasetManifest,
    Manifest,
    Source,
    Split,
    canonical_json,
    load_as,
    load_manifest,
    read_manifest,
    require_tokenizer,
)
from rxt_dist.data.origin import DIALOGUES_FORMAT
from rxt_dist.data.rows import PAD_ID, SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, DataError, nearest
from rxt_dist.files import blake3_file, fsync_dir, temporary_path

DIALOGUES_VERSION = 1
RECALL_COLUMN = "recall"
_BATCH_DIALOGUES = 1024
_SHARD_TOKENS = 1 << 28  # 512 MB
_REPAIR = "Delete the file and run the same `rxt-dist data interactions` again: it rebuilds what is missing."


Recalls = tuple[tuple[int, int, int], ...]


# ---------------------------------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DialogueTotals(Counts):
    """Counts over dialogues; `tokens` includes control tokens, `targets` are the tokens with loss."""

    dialogues: int = 0
    turns: int = 0
    tokens: int = 0
    targets: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class DialogueShard:
    """One shard: `file` relative to the dataset folder."""

    file: str
    dialogues: int
    bytes: int
    blake3: str

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> DialogueShard:
        return DialogueShard(**value)


@dataclass(frozen=True)
class DialogueSplit(Split[DialogueTotals, DialogueShard]):
    """The dialogues of one source and split."""

    totals_type, shard_type = DialogueTotals, DialogueShard

    totals: DialogueTotals = DialogueTotals()


@dataclass(frozen=True)
class DialogueSource(Source[DialogueSplit]):
    """Dialogues that are weighted and evaluated together."""

    split_type = DialogueSplit

    train: DialogueSplit = DialogueSplit()
    eval: DialogueSplit = DialogueSplit()


@dataclass(frozen=True, kw_only=True)
class DialogueManifest(Manifest[DialogueSource]):
    """The manifest of a dataset of dialogues; `seq_len` is the most tokens that a turn has.

    system_query: see `are_system_prompts`; stated in the template of RxT-Alpha alone.
    """

    FORMAT, VERSION = DIALOGUES_FORMAT, DIALOGUES_VERSION
    source_type = DialogueSource
    own_fields = ("template",)

    template: str
    system_query: tuple[int, ...] = ()

    @property
    def totals(self) -> DialogueTotals:
        return sum((source.train.totals + source.eval.totals for source in self.sources), DialogueTotals())

    def shards(self) -> Iterator[DialogueShard]:
        """Every shard of every source and split."""
        for source in self.sources:
            yield from source.train.shards + source.eval.shards

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        found = super().from_dict({"files": (), **value})  # earlier versions stated none
        return replace(found, system_query=tuple(value.get("system_query", ())))

    def to_dict(self) -> dict[str, Any]:
        stated = {"system_query": list(self.system_query)} if self.system_query else {}
        return super().to_dict() | stated


AnyManifest = DatasetManifest | DialogueManifest


def manifest_of(text: bytes) -> AnyManifest:
    """The manifest, of either kind, that a sound `dataset.json` holds."""
    value = json.loads(text)
    kind = DialogueManifest if value.get("format") == DIALOGUES_FORMAT else DatasetManifest
    return kind.from_dict(value)


def unsealed_manifest(text: bytes) -> DialogueManifest | None:
    """The manifest that an earlier version wrote, which vouched for the shards alone; None for any other text."""
    try:
        value = json.loads(text)
        if value.get("format") != DIALOGUES_FORMAT:
            return None
        manifest = DialogueManifest.from_dict(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    as_written = {key: item for key, item in manifest.to_dict().items() if key != "files"}
    return manifest if canonical_json(as_written) == canonical_json(value) else None


def load_any_manifest(root: Path) -> AnyManifest:
    """The manifest of a dataset of either kind: rows (documents, single interactions) or dialogues.

    Raises:
        DataError: as `load_manifest` and `load_dialogue_manifest`.
    """
    try:
        value = json.loads(read_manifest(root / DATASET_FILE) or b"{}")
    except ValueError:
        value = {}
    is_dialogues = isinstance(value, dict) and value.get("format") == DIALOGUES_FORMAT
    return load_dialogue_manifest(root) if is_dialogues else load_manifest(root)


def load_dialogue_manifest(root: Path) -> DialogueManifest:
    """Read and check `root/dataset.json` of a dataset of dialogues.

    Raises:
        DataError: no such dataset, one that cannot be read, another kind or version of dataset, or a manifest that was
            edited or damaged.
    """
    hint = (
        "Make one with `rxt-dist data interactions INPUTS --kind dialogues --out DIR` (the same command finishes an "
        "interrupted one), or check the path."
    )

    def refused(value: Mapping[str, Any]) -> str:
        return (
            f"{root / DATASET_FILE} has format {value.get('format')!r} version {value.get('version')!r}, but dialogues "
            f"are {DIALOGUES_FORMAT!r} version {DIALOGUES_VERSION}. Name a folder that `rxt-dist data interactions "
            f"--kind dialogues` made."
        )

    return load_as(DialogueManifest, root, hint, refused, _REPAIR)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class DialogueWriter:
    """Writes the dialogues of one source, split and unit as `<stem>-000.arrow`, `<stem>-001.arrow`, ...

    A shard appears under its name only whole: written to a temporary file, synced, hashed, renamed. The first dialogue
    with a recall begins another shard, and this and all later ones have the column.
    """

    def __init__(self, root: Path, directory: str, stem: str, vocab_size: int, metadata: Mapping[str, str]) -> None:
        self._root, self._directory, self._stem, self._vocab_size = root, directory, stem, vocab_size
        self._metadata = dict(metadata)
        self._has_recalls = False
        self._pending: list[list[npt.NDArray[np.uint16]]] = []
        self._pending_recalls: list[Recalls] = []
        self._shards: list[DialogueShard] = []
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._dialogues = self._tokens = 0

    def add(self, turns: list[npt.NDArray[np.uint16]], recalls: Recalls = ()) -> None:
        """Take one dialogue: for each turn the ids of a whole interaction, BOS and EOS included, and (distance, first
        token, end) of what it recalls; no `recalls` where no turn does."""
        if recalls and not self._has_recalls:
            self._write()
            self._commit()
            self._has_recalls = True
        assert all(_is_recall(recall, len(turn)) for recall, turn in zip(recalls, turns, strict=bool(recalls)))
        self._pending.append(turns)
        self._pending_recalls.append(recalls or ((0, 0, 0),) * len(turns))
        if len(self._pending) == _BATCH_DIALOGUES:
            self._write()

    def finish(self) -> tuple[DialogueShard, ...]:
        """Write what is left, commit the last shard and return all of them in order."""
        self._write()
        self._commit()
        return tuple(self._shards)

    def _write(self) -> None:
        if not self._pending:
            return
        turns = [turn for dialogue in self._pending for turn in dialogue]
        tokens = np.concatenate(turns)
        lengths = np.array([len(turn) for turn in turns], dtype=np.int64)
        assert int(tokens.max()) < self._vocab_size, f"token id {tokens.max()} >= vocabulary {self._vocab_size}"
        firsts = np.concatenate([np.arange(len(dialogue)) == 0 for dialogue in self._pending])
        check_interactions(tokens, lengths, firsts)
        if self._writer is None:
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(self._temporary), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
        turn_bounds = np.cumsum([0] + [len(dialogue) for dialogue in self._pending])
        token_bounds = np.concatenate(([0], np.cumsum(lengths)))[turn_bounds]
        columns = [
            pa.LargeListArray.from_arrays(pa.array(token_bounds, pa.int64()), pa.array(tokens)),
            pa.LargeListArray.from_arrays(pa.array(turn_bounds, pa.int64()), pa.array(lengths.astype(np.uint16))),
        ]
        if self._has_recalls:
            numbers = np.array([turn for recalls in self._pending_recalls for turn in recalls], dtype=np.uint16)
            columns.append(
                pa.LargeListArray.from_arrays(pa.array(3 * turn_bounds, pa.int64()), pa.array(numbers.reshape(-1)))
            )
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._dialogues += len(self._pending)
        self._tokens += len(tokens)
        self._pending, self._pending_recalls = [], []
        if self._tokens >= _SHARD_TOKENS:
            self._commit()

    @property
    def _schema(self) -> pa.Schema:
        lists = pa.large_list(pa.uint16())
        names = ("tokens", "turn_len", *([RECALL_COLUMN] if self._has_recalls else []))
        return pa.schema([pa.field(name, lists, nullable=False) for name in names], metadata=self._metadata)

    @property
    def _name(self) -> str:
        return f"{self._directory}/{self._stem}-{len(self._shards):03d}.arrow"

    @property
    def _temporary(self) -> Path:
        return temporary_path(self._root / self._name)

    def _commit(self) -> None:
        if self._writer is None:
            return
        assert self._file is not None
        self._writer.close()
        self._file.close()
        final, temporary = self._root / self._name, self._temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        shard = DialogueShard(self._name, self._dialogues, temporary.stat().st_size, blake3_file(temporary))
        os.replace(temporary, final)
        fsync_dir(final.parent)
        self._shards.append(shard)
        self._writer, self._file, self._dialogues, self._tokens = None, None, 0, 0


def _is_recall(recall: tuple[int, int, int], tokens: int) -> bool:
    distance, first, end = recall
    return recall == (0, 0, 0) or (distance >= 1 and 0 < first < end < tokens)


def dialogue_metadata(seq_len: int, tokenizer_sha256: str, template: str, spec_hash: str) -> dict[str, str]:
    """The schema metadata that every shard of dialogues carries."""
    return {
        "rxt.format": DIALOGUES_FORMAT,
        "rxt.version": str(DIALOGUES_VERSION),
        "rxt.seq_len": str(seq_len),
        "rxt.dtype": "uint16",
        "rxt.tokenizer_sha256": tokenizer_sha256,
        "rxt.special_tokens": canonical_json(SPECIAL_TOKENS),
        "rxt.template": template,
        "rxt.spec_hash": spec_hash,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DialogueBatch:
    """B dialogues of N turns of T tokens, padded with turns of length 0 and tokens of id 0 ([PAD]).

    tokens_BUT: int64 ids. lengths_BU: int64 tokens of each turn, 0 where a dialogue has fewer turns.
    labels_BUT: int64, as `interactions.answer_labels`: the next token where it carries loss, else -100.
    system_B: bool, dialogues whose first turn is a system prompt, which has no labels.
    """

    tokens_BUT: npt.NDArray[np.int64]
    lengths_BU: npt.NDArray[np.int64]
    labels_BUT: npt.NDArray[np.int64]
    system_B: npt.NDArray[np.bool_]


class DialogueDataset:
    """The dialogues of one split, all sources one after another or one of them.

    Args:
        root: a folder that `rxt-dist data interactions --kind dialogues` made.
        split: "train" or "eval".
        source: name of the only source to read; None reads all, in the manifest's order.
        tokenizer_sha256: fingerprint of the tokenizer that the caller uses, if it has one.

    Raises:
        DataError: no such dataset, a shard missing or of the wrong size, another tokenizer.
        ConfigError: no such source.
    """

    def __init__(
        self, root: Path, split: str = "train", source: str | None = None, tokenizer_sha256: str | None = None
    ) -> None:
        self.root = root
        self.manifest = load_dialogue_manifest(root)
        require_tokenizer(root, self.manifest.tokenizer_sha256, tokenizer_sha256)
        names = [item.name for item in self.manifest.sources]
        if source is not None and source not in names:
            raise ConfigError(f"{root} has no source '{source}'; it has {names}.{nearest(source, names)}")
        wanted = [item for item in self.manifest.sources if source in (None, item.name)]
        self._infos = [shard for item in wanted for shard in item.split(split).shards]
        for info in self._infos:
            path = root / info.file
            size = path.stat().st_size if path.is_file() else None
            if size != info.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {info.bytes:,}"
                raise DataError(f"Shard {path} {found}. {_REPAIR}")
        self._ends = np.cumsum([info.dialogues for info in self._infos], dtype=np.int64)
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def dialogue(self, index: int) -> list[npt.NDArray[np.uint16]]:
        """The turns of one dialogue, uint16 [tokens] each, in order.

        Raises:
            IndexError: `index` is not in [0, len).
            DataError: the dialogue's shard is damaged.
        """
        table, row = self._place(index)
        tokens, lengths = (table[name][row].values.to_numpy(zero_copy_only=True) for name in ("tokens", "turn_len"))
        return np.split(tokens, np.cumsum(lengths[:-1], dtype=np.int64))

    def recalls(self, index: int) -> npt.NDArray[np.int64]:
        """What each turn of a dialogue recalls, int64 [turns, 3]: how many turns before the value was told, the first
        token of the turn that holds it, and the end of these tokens; zeros where a turn recalls nothing.

        Raises:
            IndexError, DataError: as `dialogue`.
        """
        table, row = self._place(index)
        if RECALL_COLUMN not in table.column_names:
            return np.zeros((len(table["turn_len"][row].values), 3), dtype=np.int64)
        numbers = table[RECALL_COLUMN][row].values.to_numpy(zero_copy_only=True)
        return numbers.astype(np.int64).reshape(-1, 3)

    def _place(self, index: int) -> tuple[pa.Table, int]:
        """The shard of a dialogue, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"dialogue {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._table(shard), index - (int(self._ends[shard - 1]) if shard else 0)

    def batch(self, indices: Sequence[int], turns: int | None = None) -> DialogueBatch:
        """The dialogues at `indices` (at least one), padded to the longest; of each the first `turns`, if given
        (at least one).

        Raises:
            IndexError, DataError: as `dialogue`.
        """
        assert len(indices) >= 1, "a batch of no dialogues"
        assert turns is None or turns >= 1, f"a batch of {turns} turns"
        dialogues = [self.dialogue(index)[:turns] for index in indices]
        most = turns or max(len(dialogue) for dialogue in dialogues)
        width = max(len(turn) for dialogue in dialogues for turn in dialogue)
        tokens_BUT = np.full((len(dialogues), most, width), PAD_ID, dtype=np.int64)
        lengths_BU = np.zeros((len(dialogues), most), dtype=np.int64)
        for b, dialogue in enumerate(dialogues):
            for n, turn in enumerate(dialogue):
                tokens_BUT[b, n, : len(turn)] = turn
                lengths_BU[b, n] = len(turn)
        labels = answer_labels(tokens_BUT.reshape(-1, width)).reshape(tokens_BUT.shape)
        system_B = are_system_prompts(tokens_BUT[:, 0], self.manifest.system_query)
        labels[system_B, 0] = NO_LOSS
        return DialogueBatch(tokens_BUT, lengths_BU, labels, system_B)

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            info, path = self._infos[shard], self.root / self._infos[shard].file
            if blake3_file(path) != info.blake3:
                raise DataError(
                    f"Shard {path} does not have the content its manifest states (blake3 differs: a flipped bit or "
                    f"another file). {_REPAIR}"
                )
            self._tables[shard] = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return self._tables[shard]
