"""Dialogues in which facts are told and asked for a known number of turns later, as records of interactions.

A file has one distance K: each of its dialogues asks for something that was told exactly K turns before, and never for
anything told earlier than that; its other questions lie 1 to K turns after the telling. Turns in which nothing is told
or asked are other talk. A fact is told once and asked for once; a question alone never decides its answer.

    OUT/en-d4.jsonl                   to train: source recall-d4-en (by --name)
    OUT/held-out/en-d4-values.jsonl   values that no training file has: source recall-d4-values-en
    OUT/held-out/en-d16.jsonl         a distance that no training file has: source recall-d16-en

A record has the dialogue as plain text too, so that tokenizers and datasets of documents are made from the same files;
of one that is held out the text is null, which those pass over.
Each dialogue depends on (seed, language, file, index) alone, so a file of more dialogues begins with the same ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from data_prep.recall.english import ENGLISH
from data_prep.recall.kinds import Speech, draw
from data_prep.recall.polish import POLISH
from data_prep.synthetic import render
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import access_errors, require_folder, require_free_space, write_atomic, write_json_atomic

SPEECHES = {"en": ENGLISH, "pl": POLISH}
VARIETIES = ("small", "full")
REQUEST_FILE = "recall.json"
RECALL_VERSION = 1
_SMALL_KINDS = ("name", "pet", "home", "thing", "colour", "number")
_SMALL_FILLERS = 3
_FEWEST_VALUES = 4
_DIALOGUE_BYTES = 250  # of a record, at the least; and of each turn of the longest dialogue


@dataclass(frozen=True)
class RecallRequest:
    """What is to be made.

    distances, held_out_distances: turns from telling to asking, the latter in held-out files alone.
    facts: most facts of a dialogue. fillers: most turns of other talk beyond those that a distance needs.
    turns: most turns of a dialogue; None for what the others come to.
    count, held_out_count: dialogues of a training file and of a held-out one.
    held_out_values: share of each list of values that only held-out files have.
    values: most values of a kind of facts; None: all that the variety has.
    name: what the sources are called by, NAME-d4-en.

    Raises:
        ConfigError: a value that cannot be.
    """

    languages: tuple[str, ...] = ("en", "pl")
    distances: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    held_out_distances: tuple[int, ...] = (12, 16)
    facts: int = 3
    fillers: int = 2
    turns: int | None = None
    count: int = 5000
    held_out_count: int = 400
    held_out_values: float = 0.1
    variety: str = "full"
    values: int | None = None
    seed: int = 0
    name: str = "recall"

    def __post_init__(self) -> None:
        for language in self.languages:
            if language not in SPEECHES:
                raise ConfigError(f"--languages has {language!r}; known are {', '.join(SPEECHES)}.")
        everything = self.distances + self.held_out_distances
        if not self.languages or not self.distances:
            raise ConfigError("--languages and --distances name at least one each.")
        if min(everything) < 1:
            raise ConfigError(f"A distance is {min(everything)}; it is at least 1, the very next turn.")
        if len(set(everything)) < len(everything) or len(set(self.languages)) < len(self.languages):
            raise ConfigError(
                f"--distances {_listed(self.distances)}, --held-out-distances {_listed(self.held_out_distances)} and "
                f"--languages {_listed(self.languages)}: name each once; a distance is trained or held out."
            )
        if self.turns is not None and self.turns <= max(everything):
            raise ConfigError(
                f"--turns is {self.turns}, but what is asked for {max(everything)} turns later needs "
                f"{max(everything) + 1} turns. Raise it, or leave out the distance."
            )
        if not 0 <= self.held_out_values <= 0.5:
            raise ConfigError(f"--held-out-values is {self.held_out_values}; it is a share from 0 to 0.5.")
        if self.values is not None and self.values < _FEWEST_VALUES:
            raise ConfigError(
                f"--values is {self.values}; at least {_FEWEST_VALUES}: some are held out, and each gender keeps some."
            )
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ConfigError(f"--name is {self.name!r}; sources are called by small letters, digits and _.")
        if self.variety not in VARIETIES:
            raise ConfigError(f"--variety is {self.variety!r}; known are {', '.join(VARIETIES)}.")

    @property
    def longest(self) -> int:
        """Turns of the longest dialogue that can come."""
        needed = max(*self.distances, *self.held_out_distances, 2 * self.facts - 1) + 1 + self.fillers
        return needed if self.turns is None else min(needed, self.turns)


@dataclass(frozen=True)
class Part:
    """A file: its distance, and whether its values (or its distance) are held out."""

    name: str
    language: str
    distance: int
    held_out: bool
    new_values: bool

    @property
    def file(self) -> str:
        name = f"{self.language}-d{self.distance}{'-values' * self.new_values}.jsonl"
        return f"held-out/{name}" if self.held_out else name

    @property
    def source(self) -> str:
        """The tag of its records; the language is added to it where the dataset is built."""
        return f"{self.name}-d{self.distance}{'-values' * self.new_values}"


def parts(request: RecallRequest) -> list[Part]:
    """The files of a request."""
    found = []
    for language in request.languages:
        found += [Part(request.name, language, distance, False, False) for distance in request.distances]
        if request.held_out_values:
            found += [Part(request.name, language, distance, True, True) for distance in request.distances]
        found += [Part(request.name, language, distance, True, False) for distance in request.held_out_distances]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One dialogue
# ---------------------------------------------------------------------------------------------------------------------


def dialogues(request: RecallRequest, part: Part, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` records of a file."""
    whole = SPEECHES[part.language]
    speech = whole.small(_SMALL_KINDS, _SMALL_FILLERS) if request.variety == "small" else whole
    if request.values is not None:
        speech = speech.first_values(request.values)
    speech = speech.with_values(request.held_out_values, part.new_values)
    tags = {"language": part.language, "source": part.source} | ({"held_out": True} if part.held_out else {})
    for index in range(count):
        rng = Random(f"rxt-recall-v{RECALL_VERSION}|{request.seed}|{request.variety}|{part.file}|{index}")
        turns = _interactions(request, part.distance, speech, rng)
        yield tags | {"interactions": turns, "text": None if part.held_out else render(turns, part.language)}


def _interactions(request: RecallRequest, distance: int, speech: Speech, rng: Random) -> list[dict[str, Any]]:
    facts = draw(speech, rng.randint(1, request.facts), rng)
    most = request.longest
    turns = min(most, max(distance + 1, 2 * len(facts)) + rng.randint(0, request.fillers))
    made: list[dict[str, Any] | None] = [None] * turns
    for fact, (told, asked) in zip(facts, _places(turns, distance, len(facts), rng), strict=False):
        made[told] = {"query": fact.told, "answer": fact.reply}
        recall = {"distance": asked - told, "value": fact.value}
        made[asked] = {"query": fact.asked, "answer": fact.answer, "recall": recall}
    return [turn or _filler(speech, rng) for turn in made]


def _filler(speech: Speech, rng: Random) -> dict[str, Any]:
    query, answer = rng.choice(speech.fillers)(rng)
    return {"query": query, "answer": answer}


def _places(turns: int, distance: int, facts: int, rng: Random) -> list[tuple[int, int]]:
    """Turns of telling and asking for each fact: the first `distance` apart, the others at most so; fewer than `facts`
    where no two turns are free that lie near enough."""
    first = rng.randrange(turns - distance)
    places = [(first, first + distance)]
    free = set(range(turns)) - set(places[0])
    while len(places) < facts:
        by_distance: dict[int, list[int]] = {}
        for told in sorted(free):
            for apart in range(1, distance + 1):
                if told + apart in free:
                    by_distance.setdefault(apart, []).append(told)
        if not by_distance:
            break
        apart = rng.choice(sorted(by_distance))
        told = rng.choice(by_distance[apart])
        places.append((told, told + apart))
        free -= {told, told + apart}
    return places


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_recall(out: Path, request: RecallRequest) -> list[tuple[Part, int]]:
    """Write the files of a request into folder `out`, or those that an interrupted call left out.

    Returns:
        Each file with its number of dialogues.

    Raises:
        DataError: `out` holds something else, or another request's files.
        ConfigError: `out` cannot be written to.
        DiskError: too little space.
    """
    require_folder(out)
    asked = {"version": RECALL_VERSION} | json.loads(json.dumps(asdict(request)))
    _require_own(out, asked)
    files = [(part, request.held_out_count if part.held_out else request.count) for part in parts(request)]
    missing = [(part, count) for part, count in files if not (out / part.file).is_file()]
    dialogue_bytes = _DIALOGUE_BYTES * (1 + request.longest)
    require_free_space(out, sum(count for _, count in missing) * dialogue_bytes, "The dialogues")
    with access_errors(out, f"The files that are whole stay in {out}; the same command makes the others."):
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / REQUEST_FILE, asked)
        for part, count in missing:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in dialogues(request, part, count)]
            (out / part.file).parent.mkdir(exist_ok=True)
            write_atomic(out / part.file, "".join(lines))
    return files


def _require_own(out: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds what no call of this request has left there."""
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        found = json.loads((out / REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{out} already exists and holds no dialogues of this program. Name a new folder.") from None
    other = sorted(name for name in asked if not isinstance(found, dict) or found.get(name) != asked[name])
    if other:
        raise DataError(
            f"{out} holds dialogues of another request (other {', '.join(other)}). Name a new folder, or delete this "
            f"one."
        )


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))
