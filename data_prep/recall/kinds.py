"""What a fact is: a kind with its values, the sentences that tell one, and the questions that ask for it.

A sentence is a template. `{v}` is the value, `{s}` the slot, which tells facts of one kind apart (whose name, what is
in which place), `{a}` the article of the value. A form is named in brackets: `{v[acc]}` is a case, `{s[mój/moja]}`
agrees with the slot. A value with forms `nom.m`, `nom.f`, ... takes those of the slot's gender. Sentences begin with a
small letter where the word has one; a capital is put where they stand first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from random import Random

from data_prep.synthetic import Word

_NO_SLOT = (Word({"nom": ""}, 0),)
_VALUE = re.compile(r"\{v(?:\[[^]]*\])?\}")
_GENDERS = "mfn"
_SMALL_VALUES, _SMALL_SLOTS = 30, 2


@dataclass(frozen=True)
class Kind:
    """Facts of one kind. asks: questions, each with its answer, which has the value once.

    same_gender: a value goes with slots of its own gender only (names of a brother).
    """

    name: str
    values: tuple[Word, ...]
    tells: tuple[str, ...]
    asks: tuple[tuple[str, str], ...]
    slots: tuple[Word, ...] = _NO_SLOT
    same_gender: bool = False


@dataclass(frozen=True)
class Speech:
    """A language: its kinds, what a fact is answered with, how a telling and a question may begin, and other talk."""

    kinds: tuple[Kind, ...]
    replies: tuple[str, ...]
    tell_openings: tuple[str, ...]
    ask_openings: tuple[str, ...]
    fillers: tuple[Callable[[Random], tuple[str, str]], ...]

    def small(self, kinds: Iterable[str], fillers: int) -> Speech:
        """A language that a very small model learns within minutes: the kinds of these names with few slots, 30 values
        and one sentence of each sort, and the first `fillers` sorts of other talk."""
        chosen = [kind for kind in self.kinds if kind.name in kinds]
        assert len(chosen) == len(tuple(kinds)), "a kind that the language does not have"
        few = tuple(
            replace(
                kind,
                values=kind.values[:_SMALL_VALUES],
                slots=kind.slots[:_SMALL_SLOTS],
                tells=kind.tells[:1],
                asks=kind.asks[:1],
            )
            for kind in chosen
        )
        return Speech(few, self.replies[:1], ("",), ("",), self.fillers[:fillers])

    def first_values(self, most: int) -> Speech:
        """The same with the first `most` values of each kind."""
        return replace(self, kinds=tuple(replace(kind, values=kind.values[:most]) for kind in self.kinds))

    def with_values(self, share: float, held_out: bool) -> Speech:
        """The same with a part of the values: those held out (`share` of each list), or the others."""
        return replace(self, kinds=tuple(_with_values(kind, share, held_out) for kind in self.kinds))


@dataclass(frozen=True)
class Fact:
    """One fact as sentences: `told` says it; `asked` asks for it, and its `answer` holds `value` exactly once."""

    kind: str
    told: str
    reply: str
    asked: str
    answer: str
    value: str


def fact(kind: Kind, slot: Word, value: Word, speech: Speech, rng: Random) -> Fact:
    """The fact that `value` is what fills `slot`, in sentences drawn from `rng`."""
    word = _fitted(value, slot)
    words: dict[str, Word | str] = {"s": slot, "v": word, "a": word.forms.get("a", "")}
    asked, answer = rng.choice(kind.asks)
    form = _VALUE.findall(answer)
    return Fact(
        kind.name,
        _sentence(rng.choice(speech.tell_openings) + rng.choice(kind.tells), words),
        _sentence(rng.choice(speech.replies), words),
        _sentence(rng.choice(speech.ask_openings) + asked, words),
        _sentence(answer, words),
        form[0].format(**words),
    )


def draw(speech: Speech, count: int, rng: Random) -> list[Fact]:
    """Facts that cannot be taken for each other: no two of one kind and slot, none with the value of another one.

    Returns:
        As many of `count` as the language has.
    """
    drawn: list[Fact] = []
    places = {(kind.name, number): kind for kind in speech.kinds for number in range(len(kind.slots))}
    taken: set[str] = set()
    while len(drawn) < count and places:
        # The kind first: one of many slots is not told more often for it.
        name = rng.choice(sorted({name for name, _ in places}))
        place = rng.choice([one for one in places if one[0] == name])
        kind = places.pop(place)
        slot = kind.slots[place[1]]
        values = [
            value
            for value in kind.values
            if str(value) not in taken and not (kind.same_gender and value.gender != slot.gender)
        ]
        if values:
            value = rng.choice(values)
            taken.add(str(value))
            drawn.append(fact(kind, slot, value, speech, rng))
    return drawn


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _sentence(template: str, words: dict[str, Word | str]) -> str:
    return capital(template.format(**words))


def _fitted(value: Word, slot: Word) -> Word:
    """The value with the forms of the slot's gender, where it has such."""
    end = f".{_GENDERS[slot.gender]}"
    own = {name.removesuffix(end): form for name, form in value.forms.items() if name.endswith(end)}
    return Word(value.forms | own, value.gender) if own else value


def _with_values(kind: Kind, share: float, held_out: bool) -> Kind:
    """By a hash of the value alone: kinds that share a list share what is held out, and every seed holds out the same.
    Of each gender its share, at least one: else a slot might be left without a value."""
    chosen: set[str] = set()
    for gender in {value.gender for value in kind.values}:
        names = sorted((str(value) for value in kind.values if value.gender == gender), key=_rank)
        chosen.update(names[: max(1, round(share * len(names)))] if share else ())
    return replace(kind, values=tuple(value for value in kind.values if (str(value) in chosen) == held_out))


def _rank(name: str) -> bytes:
    return hashlib.sha256(f"rxt-recall-held-out|{name}".encode()).digest()
