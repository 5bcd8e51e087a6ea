"""The smallest tokenizer that tests answer with."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rxt_dist.data.rows import SPECIAL_TOKENS


def byte_tokenizer(path: Path, vocabulary: dict[str, int] | None = None) -> Path:
    """Control tokens, printable bytes and nothing else, as a tokenizer.json."""
    if vocabulary is None:
        bytes_of_text = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
        vocabulary = SPECIAL_TOKENS | {token: 11 + number for number, token in enumerate(bytes_of_text)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in SPECIAL_TOKENS if name in vocabulary])
    tokenizer.save(str(path))
    return path
