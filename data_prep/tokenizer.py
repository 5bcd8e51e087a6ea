"""The bilingual byte-level BPE: training, loading with checks, and a report of how well it fits.

Byte-level with the whole byte alphabet: any text has ids and comes back exactly, and [UNK] never appears. The control
tokens stand at fixed ids and no text can spell them: a document that contains "[T]" (`List[T]` in code) is encoded as
the three characters. BOS and EOS are added by id when rows are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.corpora import Document
from rxt_dist.data.format import MAX_VOCABULARY, SPECIAL_COUNT, SPECIAL_TOKENS, tokenizer_fingerprint
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import write_atomic

MIN_VOCABULARY = SPECIAL_COUNT + 256

# 64 MB of text a language decides the merges of a large vocabulary; more only costs time and memory.
SAMPLE_BYTES = 64 << 20
REPORT_DOCUMENTS = 400

_PROBE = "Zażółć gęślą jaźń — naïve façade, 漢字, 🦊\u200d🚀,\ttabs\r\n  spaces  [T][PAD] [BOS]"


@dataclass(frozen=True)
class LanguageReport:
    """How a tokenizer fits one language, over up to 400 documents."""

    language: str
    documents: int
    tokens: int
    words: int
    text_bytes: int
    round_trip_failures: int

    def to_dict(self) -> dict[str, Any]:
        """The counts, with `tokens_per_word` (fertility) and `bytes_per_token` (compression)."""
        ratios = {"tokens_per_word": self.tokens / self.words, "bytes_per_token": self.text_bytes / self.tokens}
        return asdict(self) | {name: round(value, 3) for name, value in ratios.items()}


def require_vocabulary_size(vocab_size: int) -> None:
    """Raise ConfigError unless a tokenizer of `vocab_size` ids can be trained."""
    if not MIN_VOCABULARY <= vocab_size <= MAX_VOCABULARY:
        raise ConfigError(
            f"--vocab-size is {vocab_size}; it must be from {MIN_VOCABULARY} ({SPECIAL_COUNT} control tokens and 256 "
            f"bytes) to {MAX_VOCABULARY} (shards hold 16-bit ids)."
        )


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Train on at most 64 MB of text a language. A small corpus may give fewer than `vocab_size` ids.

    Raises:
        ConfigError: `vocab_size` is outside [267, 65,536].
        DataError: there are no documents.
    """
    require_vocabulary_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    taken: dict[str, int] = {}
    tokenizer.train_from_iterator(_sample(documents, taken), trainer)
    if not taken:
        raise DataError("There is no text to train a tokenizer on: every document is empty or was skipped.")
    tokenizer.encode_special_tokens = True
    return check_tokenizer(tokenizer, "the trained tokenizer")


def _sample(documents: Iterable[Document], taken: dict[str, int]) -> Iterator[str]:
    """Texts until a language has its share; later documents of that language are passed over."""
    for document in documents:
        size = taken.get(document.language, 0)
        if size < SAMPLE_BYTES:
            taken[document.language] = size + len(document.text.encode())
            yield document.text


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> str:
    """Write tokenizer.json atomically and return its fingerprint."""
    text = tokenizer.to_str(pretty=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return tokenizer_fingerprint(text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load and check a tokenizer.json.

    Raises:
        DataError: missing, unreadable, control tokens not at ids 0..10, more than 65,536 ids, or not lossless.
    """
    if not path.is_file():
        raise DataError(f"The tokenizer {path} does not exist. Train one with `rxt-dist data tokenizer`.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json of the `tokenizers` library ({error}).") from error
    # The file cannot say this: without it the text "[T]" would become the control token.
    tokenizer.encode_special_tokens = True
    return check_tokenizer(tokenizer, str(path))


def check_tokenizer(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Return the tokenizer if its shards can be trusted.

    Raises:
        DataError: see `load_tokenizer`.
    """
    wrong = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if wrong != SPECIAL_TOKENS:
        raise DataError(
            f"{name} does not have the control tokens at their ids: it has {wrong}, needed is {SPECIAL_TOKENS}. Train "
            f"a tokenizer with `rxt-dist data tokenizer`, or give the tokens these ids."
        )
    size = tokenizer.get_vocab_size()
    if size > MAX_VOCABULARY:
        raise DataError(f"{name} has {size} ids; shards hold 16-bit ids, so at most {MAX_VOCABULARY} fit.")
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if min(ids) < SPECIAL_COUNT:
        raise DataError(f"{name} turns ordinary text into control tokens; a byte-level BPE without [UNK] is needed.")
    if tokenizer.decode(ids, skip_special_tokens=False) != _PROBE:
        raise DataError(f"{name} does not give back the text it encoded; a byte-level BPE without normaliser does.")
    return tokenizer


def fit_report(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[LanguageReport]:
    """Fertility and exact round trips per language, over the first 400 documents of each."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        kept = texts.setdefault(document.language, [])
        if len(kept) < REPORT_DOCUMENTS:
            kept.append(document.text)
    reports = []
    for language in sorted(texts):
        encoded = [item.ids for item in tokenizer.encode_batch(texts[language], add_special_tokens=False)]
        decoded = tokenizer.decode_batch(encoded, skip_special_tokens=False)
        reports.append(
            LanguageReport(
                language=language,
                documents=len(encoded),
                tokens=sum(len(ids) for ids in encoded),
                words=sum(len(text.split()) for text in texts[language]),
                text_bytes=sum(len(text.encode()) for text in texts[language]),
                round_trip_failures=sum(a != b for a, b in zip(texts[language], decoded, strict=True)),
            )
        )
    return reports
