"""Taking over a tokenizer.json that was made elsewhere: everything that shards and models rely on, checked by name.

`load_tokenizer` checks what a short probe can show, each time. This looks closer, once, before terabytes are encoded:
into the file, at what the tokenizer does with every character of Unicode, and with the texts it is meant for. Each
check says what was found and what to do; all of them run, so that one reading of the message is enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from data_prep.tokenizing.report import planes
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.rows import MAX_VOCABULARY, SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.errors import DataError
from rxt_dist.files import write_atomic

# Where long texts are cut before they are encoded (encode.py); a subset of it, on which every cut must be harmless.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])[ \n](?=[^\W\d_])")
_CUTS = 50
# What normalisers change: cases, accents, ligatures and widths, kinds of blanks and quotes, control characters.
_FRAGILE = (
    "Zażółć GĘŚLĄ jaźń", "e\u0301 z\u0307 \u00e9", "ﬁ ﬂ ① ｆｕｌｌ ²", "a\u00a0b\u2003c\u200bd", " two  spaces ",
    "\ttab\r\nline\n\n", "“quotes” ‘and’ …", "\ufeffbom", "\x00\x07\x1b", "漢字 かな 한글", "🦊\u200d🚀 👍🏽",
    "İstanbul ß ſ", "[T] [PAD][BOS]",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `problem` None where it is as needed, else what was found and what to do."""

    name: str
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_tokenizer(path: Path, out: Path, texts: Sequence[str]) -> tuple[list[Check], str]:
    """Write a copy of a tokenizer.json to `out` if every check passes; returns the checks and the fingerprint.

    Raises:
        DataError: missing, unreadable, or failed checks, each with what to do.
    """
    checks = examine(path, texts)
    failed = [check for check in checks if check.problem is not None]
    if failed:
        problems = " ".join(f"({number}) {check.name}: {check.problem}" for number, check in enumerate(failed, start=1))
        raise DataError(f"{path} cannot be used; {len(failed)} of {len(checks)} checks failed. {problems}")
    content = path.read_text(encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content)
    return checks, tokenizer_fingerprint(content)


def examine(path: Path, texts: Sequence[str]) -> list[Check]:
    """Run all checks, on the file and on what the tokenizer does with `texts`.

    Raises:
        DataError: the file is missing or is no tokenizer.json.
    """
    if not path.is_file():
        raise DataError(f"The tokenizer {path} does not exist. Name a tokenizer.json.")
    try:
        raw = path.read_text(encoding="utf-8")
        content = json.loads(raw)
        tokenizer = Tokenizer.from_str(raw)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{path} is not a tokenizer.json of the `tokenizers` library ({error}). With transformers, "
            f"`AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)` writes one."
        ) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    of_file: list[tuple[str, Callable[[dict[str, Any]], str | None]]] = [
        ("byte-level BPE", _byte_level),
        ("control tokens at ids 0 to 10", _control_tokens),
        ("ids of 16 bits without gaps", _ids),
        ("no normaliser that changes text", _normaliser),
        ("no other added tokens", _added_tokens),
        ("no truncation or padding", _truncation),
        ("no chance in encoding", _dropout),
    ]
    of_texts: list[tuple[str, Callable[[Tokenizer, Sequence[str]], str | None]]] = [
        ("literals stay text", _literals),
        ("every character of Unicode comes back", _unicode),
        ("the texts come back", _texts),
        ("long texts can be cut between words", _cuts),
    ]
    return [Check(name, look(content)) for name, look in of_file] + [
        Check(name, look(tokenizer, texts)) for name, look in of_texts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What the file says
# ---------------------------------------------------------------------------------------------------------------------


def _parts(value: Any, of: str) -> list[dict[str, Any]]:
    """A pre-tokenizer, decoder or normaliser, or the members of a sequence of them."""
    if not value:
        return []
    if value.get("type") == "Sequence":
        return [part for member in value[of] for part in _parts(member, of)]
    return [value]


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """All entries; of some models the vocabulary is a list, whose places are the ids."""
    stored = content["model"].get("vocab", {})
    entries = stored if isinstance(stored, dict) else {str(item[0]): index for index, item in enumerate(stored)}
    return entries | {item["content"]: item["id"] for item in content.get("added_tokens") or []}


def _byte_level(content: dict[str, Any]) -> str | None:
    model = content["model"].get("type")
    if model != "BPE":
        return f"the model is {model}. Only a byte-level BPE gives back every text; train one on your texts."
    splits = [part for part in _parts(content.get("pre_tokenizer"), "pretokenizers") if part["type"] == "ByteLevel"]
    decoders = [part["type"] for part in _parts(content.get("decoder"), "decoders")]
    if not splits or "ByteLevel" not in decoders:
        return "its pre-tokenizer or decoder is not ByteLevel, so it works on characters. Train a byte-level BPE."
    if any(part.get("add_prefix_space") for part in splits):
        return "it puts a space before each text. Set add_prefix_space to false in the file, if its maker agrees."
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - content["model"]["vocab"].keys()
    if missing:
        return f"{len(missing)} of the 256 bytes have no entry, so some text cannot be written. Train another one."
    return None


def _control_tokens(content: dict[str, Any]) -> str | None:
    vocabulary = _vocabulary(content)
    wrong = {token: vocabulary.get(token) for token in SPECIAL_TOKENS if vocabulary.get(token) != SPECIAL_TOKENS[token]}
    if wrong:
        found = ", ".join(f"{token} is {'missing' if at is None else at}" for token, at in wrong.items())
        return f"needed are {_listed()}, but {found}. Renumber the entries, or train a tokenizer here."
    marked = {item["content"] for item in content.get("added_tokens") or [] if item["special"]}
    if SPECIAL_TOKENS.keys() - marked:
        names = ", ".join(sorted(SPECIAL_TOKENS.keys() - marked))
        return f"{names} are not marked as special added tokens. Add them to added_tokens with special: true."
    return None


def _listed() -> str:
    return ", ".join(f"{token}={index}" for token, index in SPECIAL_TOKENS.items())


def _ids(content: dict[str, Any]) -> str | None:
    ids = set(_vocabulary(content).values())
    if not ids:
        return "it has no entries. Train another one."
    if max(ids) >= MAX_VOCABULARY:
        return f"the largest id is {max(ids)}, and shards hold {MAX_VOCABULARY - 1} at most. Take a smaller vocabulary."
    if len(ids) != max(ids) + 1:
        return f"{max(ids) + 1 - len(ids)} ids below {max(ids)} belong to no entry. Number the entries without gaps."
    return None


def _normaliser(content: dict[str, Any]) -> str | None:
    if content.get("normalizer") is None:
        return None
    kinds = ", ".join(str(part.get("type")) for part in _parts(content["normalizer"], "normalizers"))
    normalizer = Tokenizer.from_str(json.dumps(content)).normalizer
    changed = [text for text in _FRAGILE if normalizer is not None and normalizer.normalize_str(text) != text]
    if not changed:
        return None
    return (
        f"{kinds} changes text, for example {changed[0]!r}. Set normalizer to null in the file, and normalise the "
        f"corpus instead (clean.normalise)."
    )


def _added_tokens(content: dict[str, Any]) -> str | None:
    others = [item for item in content.get("added_tokens") or [] if item["content"] not in SPECIAL_TOKENS]
    swallowing = [item["content"] for item in others if not item["special"]]
    if swallowing:
        return (
            f"{', '.join(map(repr, swallowing[:5]))} {'would' if len(swallowing) > 1 else 'would also'} be cut out of "
            f"ordinary text. Remove {len(swallowing)} entries from added_tokens, or mark them as special."
        )
    return None


def _truncation(content: dict[str, Any]) -> str | None:
    stated = [key for key in ("truncation", "padding") if content.get(key) is not None]
    if stated:
        return f"the file sets {' and '.join(stated)}, which would cut or fill documents. Set it to null in the file."
    return None


def _dropout(content: dict[str, Any]) -> str | None:
    if content["model"].get("dropout"):
        return f"the model drops merges at random (dropout {content['model']['dropout']}). Set dropout to null."
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What it does
# ---------------------------------------------------------------------------------------------------------------------


def _back(tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _literals(tokenizer: Tokenizer, _: Sequence[str]) -> str | None:
    for token in SPECIAL_TOKENS:
        text = f"List{token} {token}x {token}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if min(ids, default=0) < SPECIAL_COUNT:
            return f"the text {token} becomes a control id. Only a byte-level BPE without merges of it keeps it text."
    return None


def _unicode(tokenizer: Tokenizer, _: Sequence[str]) -> str | None:
    failing = [plane for plane in planes(tokenizer) if plane["failures"]]
    if failing:
        count = sum(plane["failures"] for plane in failing)
        tried = sum(plane["code_points"] for plane in failing)
        examples = ", ".join(failing[0]["first_failures"][:5])
        return (
            f"{count} of {tried} code points do not ({examples}, ...). A byte-level BPE without normaliser is lossless."
        )
    return None


def _texts(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    tried = (*_FRAGILE, *texts)
    failing = [text for text in tried if _back(tokenizer, text) != text]
    if failing:
        return f"{len(failing)} of {len(tried)} do not, for example {failing[0][:60]!r}. Train another one."
    return None


def _cuts(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    for text in texts[:_CUTS]:
        places = [match.start() for match in _BETWEEN_WORDS.finditer(text)]
        if not places:
            continue
        cut = places[len(places) // 2]
        whole, *parts = (
            tokenizer.encode(part, add_special_tokens=False).ids for part in (text, text[:cut], text[cut:])
        )
        if whole != parts[0] + parts[1]:
            return (
                f"the ids change when a text is cut before {text[cut : cut + 20]!r}. Its pre-tokenizer must split text "
                f"into words; set use_regex to true, or train another one."
            )
    return None
