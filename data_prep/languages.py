"""Which language a text is in: its tag, else the name of its file or folder, else a guess between English and Polish.

Only these two are guessed and taken from names, as they are what this project trains on. Most other codes of two
letters are ordinary names as well (`ts`, `cs`, `hr`, `os`, `ml`); other languages come from a column of the records or
from the `language` of a source.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rxt_dist.config.corpus import RESERVED_NAMES

UNKNOWN = "und"
_MAX_TAG = 32
_TAGS = {"eng": "en", "english": "en", "pol": "pl", "polish": "pl"}
_NAMES = {"en": "en", "eng_latn": "en", "english": "en", "pl": "pl", "pol_latn": "pl", "polish": "pl"}

_SAMPLE = 4000
_MARKS = ",.;:!?()[]\"'„”“’…*-–—"  # what touches words, cheaper to replace than words are to match


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Frequent words of each language that the other one does not have: `a`, `to`, `on`, `i`, `do`, `by`, `we`, `my`, `was`,
# `but`, `as`, `one` and `most` are missing.
_FREQUENT = {
    "en": _words(
        "the and of is in that with for his they this have has from are were she you which it be been being not its "
        "their there would could should will can if when what who how than then these those into our your him them "
        "about after before because between while where some any such only other also more many much just very "
        "through during each both does did don isn didn cannot"
    ),
    "pl": _words(
        "się nie jest że był była było byli były dla ale jak czy jego jej ich przez oraz tego już aby która który "
        "które których w z na od po są ze nad pod przed przy bez mnie ci cię mu go nam nas tym ta te tej tych tak "
        "także też można być będzie będą bardzo tylko jeszcze gdy gdzie kiedy kto co coś jako lub albo więc bo ona oni "
        "mam masz mają jeśli żeby swoje swój swoją jednak między podczas około"
    ),
}
_ANY_FREQUENT = frozenset().union(*_FREQUENT.values())
# What Dutch, German and Danish, or programs, share with English, and Czech or Croatian with Polish, proves little.
_SHARED = _words(
    "of is in he has had at an or me him for have so us all if not while from where each this "
    "na z od po ze nad pod bez ale jak nie tak"
)
_LEAST_OWN = 0.25
_FEW, _SHARE_OF_FEW, _MANY, _SHARE_OF_MANY = 2, 0.2, 3, 0.1

_POLISH_LETTERS = "ąćęłńśźż"
_OTHER_LETTERS = "čšžěřůėųđľťňăőäöüßãõáíýú"  # of languages that share letters or short words with Polish
_MOST_OTHER_LETTERS = 0.25
_LETTER_IN_NAME = 0.5  # of an English word, as a name has some


@lru_cache(maxsize=1024)
def language_tag(value: str) -> str:
    """The primary part of a tag, safe as a folder's name: pl of pl-PL, pol_Latn and Polish. "und" of what is none."""
    tag = re.sub(r"[^a-z0-9]+", "", re.split(r"[-_.]", value.strip().lower())[0])
    tag = _TAGS.get(tag, tag)
    return tag if tag and len(tag) <= _MAX_TAG and tag not in RESERVED_NAMES else UNKNOWN


def language_of(name: str, text: str) -> str:
    """The language of a text that has no tag: what the name of its file or folder says, else what the text clearly is.

    Whoever names a folder `pl` says what is in it; where that is Perl, the `language` of the source has to say so.
    """
    return language_of_name(name) or guess_language(text)


@lru_cache(maxsize=256)
def language_of_name(name: str) -> str | None:
    """English or Polish, from a file's name (stories.pl.jsonl) or else its nearest folder (pl/stories.jsonl)."""
    *folders, file = name.lower().split("/")
    parts = [*folders, *file.split(".")[:-1]]
    return next((_NAMES[part] for part in reversed(parts) if part in _NAMES), None)


def guess_language(text: str) -> str:
    """English, Polish or "und", from the frequent words and the letters of the first 4,000 characters.

    A guess needs three frequent words that make up a tenth of all, or two and a fifth, and twice as many as the other
    language has; a letter of Polish counts like a word of it. It reads about 40 MB/s, as a build does this for every
    document without a tag.
    """
    sample = text[:_SAMPLE]
    letters = others = 0
    if not sample.isascii():
        sample = unicodedata.normalize("NFC", sample)
    sample = sample.lower()
    if not sample.isascii():
        letters, others = (sum(map(sample.count, kind)) for kind in (_POLISH_LETTERS, _OTHER_LETTERS))
    for mark in _MARKS:
        sample = sample.replace(mark, " ")
    words = sample.split()
    known = list(filter(_ANY_FREQUENT.__contains__, words))
    english = sum(map(_FREQUENT["en"].__contains__, known))
    polish, shared = len(known) - english, sum(map(_SHARED.__contains__, known))

    def enough(evidence: int) -> bool:
        least = _FEW if evidence >= _SHARE_OF_FEW * len(words) else _MANY
        is_own = evidence - shared >= _LEAST_OWN * evidence
        return is_own and evidence >= least and evidence >= _SHARE_OF_MANY * len(words)

    # Names have letters too: beside English words, letters alone do not make a text Polish.
    if enough(english) and english >= 2 * polish + letters * _LETTER_IN_NAME:
        return "en"
    if others > _MOST_OTHER_LETTERS * letters or (english and not polish):
        return UNKNOWN
    return "pl" if enough(polish + letters) and polish + letters >= 2 * english else UNKNOWN
