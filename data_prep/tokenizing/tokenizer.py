"""The bilingual byte-level BPE: training, saving, and loading with checks.

Byte-level with the whole byte alphabet: any text has ids and comes back exactly, and [UNK] never appears. The control
tokens stand at fixed ids and no text can spell them: a document that contains "[T]" (`List[T]` in code) is encoded as
the three characters. BOS and EOS are added by id when rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.corpora import Document
from data_prep.tokenizing.heartbeat import heartbeat
from data_prep.tokenizing.sample import TrainingSample
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.rows import MAX_VOCABULARY, SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import write_atomic

MIN_VOCABULARY = SPECIAL_COUNT + 256

_PROBE = "Zażółć gęślą jaźń — naïve façade, 漢字, 🦊\u200d🚀,\ttabs\r\n  spaces  [T][PAD] [BOS]"


def require_vocabulary_size(vocab_size: int) -> None:
    """Raise ConfigError unless a tokenizer of `vocab_size` ids can be trained."""
    if not MIN_VOCABULARY <= vocab_size <= MAX_VOCABULARY:
        raise ConfigError(
            f"--vocab-size is {vocab_size}; it must be from {MIN_VOCABULARY} ({SPECIAL_COUNT} control tokens and 256 "
            f"bytes) to {MAX_VOCABULARY} (shards hold 16-bit ids)."
        )


def train_tokenizer(
    documents: Iterable[Document],
    vocab_size: int,
    sample: TrainingSample | None = None,
    say: Callable[[str], None] | None = lambda line: None,
) -> Tokenizer:
    """Train on a sample of the documents, by default the first 64 MB of each language.

    A small corpus may give fewer than `vocab_size` ids. `documents` is read once and not held.

    Args:
        say: told every ten seconds how far it is; None for the library's own bars on a terminal.

    Raises:
        ConfigError: `vocab_size` is outside [267, 65,536].
        DataError: there are no documents, or none of a group that has a weight.
    """
    require_vocabulary_size(vocab_size)
    sample = sample or TrainingSample()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    taking = _Taking(sample.take(documents))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=say is None,
    )
    with heartbeat(lambda: _stage(sample, taking, vocab_size), say or (lambda line: None)):
        tokenizer.train_from_iterator(taking, trainer)
    sample.require_all()
    if not sample.taken:
        raise DataError("There is no text to train a tokenizer on: every document is empty or was skipped.")
    tokenizer.encode_special_tokens = True
    return check_tokenizer(tokenizer, "the trained tokenizer")


class _Taking(Iterator[str]):
    """Texts that are taken one by one, and whether their end has been reached."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self.is_done = texts, False

    def __next__(self) -> str:
        text = next(self._texts, None)
        if text is None:
            self.is_done = True
            raise StopIteration
        return text


def _stage(sample: TrainingSample, taking: _Taking, vocab_size: int) -> str:
    read = f"{sum(list(sample.taken.values())) / 1e6:,.0f} MB of text"
    if taking.is_done:
        return f"Training the tokenizer: {read} read; merging pairs up to {vocab_size:,} ids"
    return f"Training the tokenizer: {read} read and counted so far"


def smaller_than_wanted(vocab_size: int, wanted: int) -> str:
    """What to say of a trained tokenizer that has fewer ids than were asked for; nothing where it has all."""
    if vocab_size >= wanted:
        return ""
    return (
        f"The text is too small for {wanted} ids: the tokenizer has {vocab_size}, as no further pair of tokens occurs "
        f"in the text."
    )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> str:
    """Write tokenizer.json atomically and return its fingerprint."""
    text = tokenizer.to_str(pretty=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return tokenizer_fingerprint(text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load and check a tokenizer.json. Truncation and padding that it states are switched off: they are how somebody
    once called it, no part of what its ids mean, and would cut or fill documents.

    Raises:
        DataError: missing, unreadable, control tokens not at ids 0..10, ids above 65,535 or with gaps, not lossless, or
            not giving the same ids each time.
    """
    if not path.is_file():
        raise DataError(f"The tokenizer {path} does not exist. Train one with `rxt-dist data tokenizer`.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json of the `tokenizers` library ({error}).") from error
    # The file cannot say this: without it the text "[T]" would become the control token.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return check_tokenizer(tokenizer, str(path))


def check_tokenizer(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Return the tokenizer if its shards can be trusted.

    Raises:
        DataError: see `load_tokenizer`.
    """
    assert (tokenizer.truncation, tokenizer.padding) == (None, None), f"{name} cuts or fills texts"
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise DataError(
            f"{name} leaves out merges at random (dropout {dropout:g}), so its ids differ each time. Set dropout to "
            f"null in the file's model."
        )
    wrong = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if wrong != SPECIAL_TOKENS:
        raise DataError(
            f"{name} does not have the control tokens at their ids: it has {wrong}, needed is {SPECIAL_TOKENS}. Train "
            f"a tokenizer with `rxt-dist data tokenizer`, or give the tokens these ids."
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= MAX_VOCABULARY:
        raise DataError(
            f"{name} has ids up to {largest}; shards hold 16-bit ids, so {MAX_VOCABULARY - 1} is the largest that fits."
        )
    if largest >= tokenizer.get_vocab_size():
        raise DataError(
            f"{name} has {tokenizer.get_vocab_size()} entries but ids up to {largest}. A model has a row for each id: "
            f"number the entries without gaps."
        )
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if min(ids) < SPECIAL_COUNT:
        raise DataError(f"{name} turns ordinary text into control tokens; a byte-level BPE without [UNK] is needed.")
    if tokenizer.decode(ids, skip_special_tokens=False) != _PROBE:
        raise DataError(f"{name} does not give back the text it encoded; a byte-level BPE without normaliser does.")
    return tokenizer
