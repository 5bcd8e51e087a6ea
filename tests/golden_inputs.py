"""Small corpora of every kind whose bytes never change: no random module, no library that compresses or trains.

What a library writes (packed files, tables) lies in `tests/data/golden`, made once from the texts below by
`python tests/golden_inputs.py`; the rest is written here, byte by byte.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

STORED = Path(__file__).parent / "data" / "golden"
_WORDS = {
    "en": "the a river stone of and light in house that was old with for her winter road not they slow",
    "pl": "się nie rzeka kamień jest światło dom że był stary zima droga oraz powoli która ślad źródło",
}
_SPECIAL = "[PAD] [UNK] [BOS] [EOS] [MASK] [Q] [A] [T] [C] [U] [I]"


def numbers(seed: str) -> Iterator[int]:
    """An endless stream of 32-bit numbers."""
    count = 0
    while True:
        block = hashlib.sha256(f"{seed} {count}".encode()).digest()
        yield from (int.from_bytes(block[at : at + 4], "little") for at in range(0, 32, 4))
        count += 1


def text(seed: str, language: str, words: int) -> str:
    stream, known = numbers(seed), _WORDS[language].split()
    chosen = [known[next(stream) % len(known)] + ("." if next(stream) % 9 == 0 else "") for _ in range(words)]
    return " ".join(chosen) + (" [T] and [BOS] are text" if next(stream) % 7 == 0 else "")


def texts(seed: str, language: str, count: int) -> list[str]:
    stream = numbers(f"lengths {seed}")
    return [text(f"{seed} {number}", language, 3 + next(stream) % 120) for number in range(count)]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def tokenizer_json() -> str:
    """A byte-level BPE of 11 + 256 ids and some merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = sorted(map(chr, [*printable, *range(256, 256 + 256 - len(printable))]))
    merges = ["t h", "th e", "Ġ the", "i e", "Ġ n", "Ġn ie", "e r", "a n", "an d", "o w", "Ä Ļ", "s i", "Å Ľ"]
    vocabulary = [*_SPECIAL.split(), *alphabet, *(pair.replace(" ", "") for pair in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: number for number, token in enumerate(vocabulary)}, "merges": merges}  # fmt: skip
    added = [{"id": number, "content": token, **flags} for number, token in enumerate(_SPECIAL.split())]
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                       "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                       "model": model})  # fmt: skip


def write_texts(root: Path) -> None:
    """Documents of two languages in every container, with duplicates, near-duplicates and bad input among them."""
    (root / "en").mkdir(parents=True)
    (root / "pl").mkdir()
    english = texts("jsonl", "en", 60)
    near = english[3] + " end"
    records = [{"text": item} for item in [*english, english[0], near, "", "short"]]
    (root / "en/stories.jsonl").write_bytes(lines(records) + b'{"text": "not utf-8 \xff but for one of many letters'
                                            b' in a long enough line of text that is kept and mended, one hundred or'
                                            b' so of them at the least"}\n')  # fmt: skip
    (root / "en/long.txt").write_text(text("long", "en", 900), encoding="utf-8")
    (root / "pl/plain.txt").write_text(text("plain", "pl", 80), encoding="utf-8")
    tagged = [{"text": item, "language": "en" if n % 3 else "pl"} for n, item in enumerate(texts("mixed", "en", 30))]
    (root / "mixed.jsonl").write_bytes(lines(tagged))
    for name in ("docs.jsonl.gz", "docs.jsonl.zst", "docs.parquet", "docs.arrow"):
        shutil.copyfile(STORED / name, root / "pl" / name)


def _single(seed: str, language: str, number: int) -> dict[str, Any]:
    record: dict[str, Any] = {"query": text(f"{seed} q {number}", language, 4 + number % 40),
                              "answer": text(f"{seed} a {number}", language, 2 + number % 9)}  # fmt: skip
    if number % 4 == 1:
        record |= {"think": text(f"{seed} t {number}", language, 3), "source": "Wise Men"}
    if number % 5 == 2:
        record |= {"tool_call": {"name": "find", "of": number}, "internal": "Be brief.", "language": language}
    return record


def _chat(seed: str, language: str, number: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be kind."}] if number % 2 else []
    for turn in range(1 + number % 4):
        messages.append({"role": "user", "content": text(f"{seed} u {number} {turn}", language, 5 + turn)})
        messages.append({"role": "assistant", "content": text(f"{seed} s {number} {turn}", language, 6)})
    return {"messages": messages, "language": language}


def write_chats(root: Path) -> None:
    """Single interactions and dialogues, mixed, in every container that interactions were read from."""
    (root / "pl").mkdir(parents=True)
    single = [_single("s", "en", number) for number in range(60)]
    (root / "single.en.jsonl").write_bytes(lines([*single, {"query": "nobody answers", "answer": ""}]))
    (root / "pl/chats.jsonl").write_bytes(lines([_chat("c", "pl", number) for number in range(40)]))
    listed = [{"interactions": [_single(f"l{n}", "en", k) for k in range(1 + n % 3)]} for n in range(30)]
    (root / "listed.jsonl").write_bytes(lines(listed))
    for name in ("chats.jsonl.gz", "chats.jsonl.zst", "chats.parquet"):
        shutil.copyfile(STORED / name, root / "pl" / name)


def _recalling(seed: str, language: str, number: int) -> dict[str, Any]:
    """A dialogue of which the last turn answers with what was told first, or (every third) one without such a turn."""
    stream = numbers(f"{seed} {number}")
    words = _WORDS[language].split()
    value = words[next(stream) % len(words)]
    turns = [{"query": f"It is {value}.", "answer": text(f"{seed} a {number}", language, 3)}]
    turns += [_single(f"{seed} {number} {turn}", language, 4 * turn) for turn in range(1 + next(stream) % 3)]
    if number % 3:
        turns.append(
            {"query": "What is it?", "answer": f"[{value}]", "recall": {"distance": len(turns), "value": value}}
        )
    record: dict[str, Any] = {"interactions": turns, "language": language}
    return record | ({"held_out": True, "source": "far"} if number % 7 == 6 else {})


def write_recalls(root: Path) -> None:
    """Dialogues that recall and such that do not, in three files."""
    root.mkdir(parents=True)
    for language in ("en", "pl"):
        (root / f"{language}.jsonl").write_bytes(lines([_recalling("r", language, number) for number in range(50)]))
    plain = [
        record for number in range(90) if "recall" not in (record := _recalling("o", "en", number))["interactions"][-1]
    ]
    (root / "plain.jsonl").write_bytes(lines(plain))


def write_megatron(prefix: Path) -> None:
    """A `.bin/.idx` pair of int32 ids: a document is one or two sequences, [BOS] and [EOS] around most."""
    stream, tokenizer = numbers("megatron"), Tokenizer.from_str(tokenizer_json())
    tokenizer.encode_special_tokens = True
    sequences: list[list[int]] = []
    bounds = [0]
    for number in range(150):
        ids = tokenizer.encode(text(f"m {number}", "pl", 1 + next(stream) % 60), add_special_tokens=False).ids
        framed = ids if number % 10 == 9 else [2, *ids, 3]
        cut = len(framed) // 2 if number % 4 == 0 else 0
        sequences += [framed[:cut], framed[cut:]] if cut else [framed]
        bounds.append(len(sequences))
    arrays = [np.array(ids, dtype="<i4") for ids in sequences]
    lengths = np.array([len(ids) for ids in sequences], dtype="<i4")
    pointers = 4 * (np.cumsum(lengths, dtype="<i8") - lengths)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sequences), len(bounds))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.tobytes() for ids in arrays))
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + pointers.astype("<i8").tobytes() + np.array(bounds, dtype="<i8").tobytes()
    )


def _store() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    STORED.mkdir(parents=True, exist_ok=True)

    def packed(name: str, content: bytes) -> None:
        (STORED / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        (STORED / f"{name}.zst").write_bytes(pa.Codec("zstd").compress(content, asbytes=True))

    packed("docs.jsonl", lines([{"text": item, "id": n} for n, item in enumerate(texts("packed", "pl", 40))]))
    column = texts("table", "pl", 50)
    table = pa.table({"id": list(range(51)), "text": [*column, None]})
    pq.write_table(table, STORED / "docs.parquet", row_group_size=20)
    with pa.ipc.new_file(str(STORED / "docs.arrow"), table.schema) as writer:
        writer.write_table(pa.table({"id": [0, 1, 2], "text": [*column[:2], text("arrow", "pl", 50)]}))
    packed("chats.jsonl", lines([_chat("p", "pl", number) for number in range(20)]))
    pq.write_table(pa.table({"messages": [_chat("t", "pl", number)["messages"] for number in range(30)],
                             "source": ["Forum" if n % 2 else None for n in range(30)]}),
                   STORED / "chats.parquet", row_group_size=8)  # fmt: skip


if __name__ == "__main__":
    _store()
