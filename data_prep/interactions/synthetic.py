"""The sample corpus as records: single interactions and dialogues with all their parts, for the later stages.

The dialogues tell facts early and ask for them late, with other talk between; each states in `facts` which turn tells,
which one asks and what the answer hangs on. An answer cannot be guessed from its question: the same question has
another answer wherever another fact was told. Thinking, instructions and calls of a calculator occur as well.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_prep.synthetic import LANGUAGES, facts, interaction, require_new_folder
from rxt_dist.files import access_errors, require_free_space, write_atomic

Record = dict[str, Any]

_KINDS = ("single", "dialogues")
_PHRASES = {
    "en": {
        "sum": "What is {a} plus {b}?",
        "steps": "Step by step: {a} + {tens} = {most}, {most} + {ones} = {total}.",
        "total": "{a} + {b} = {total}.",
        "bare": "Answer with the number alone.",
        "product": "What is {a} times {b}? Use the calculator.",
        "answer": "{a} times {b} is {product}.",
        "recall": 'I was told: "{told}"',
    },
    "pl": {
        "sum": "Ile to jest {a} dodać {b}?",
        "steps": "Krok po kroku: {a} + {tens} = {most}, {most} + {ones} = {total}.",
        "total": "{a} + {b} = {total}.",
        "bare": "Odpowiedz samą liczbą.",
        "product": "Ile to jest {a} razy {b}? Użyj kalkulatora.",
        "answer": "{a} razy {b} to {product}.",
        "recall": "Usłyszałem: „{told}”",
    },
}


def single(rng: random.Random, language: str) -> Record:
    """One interaction that stands by itself: plain, with thinking, with an instruction, or a step of using a tool."""
    kind = rng.randrange(5)
    if kind in (0, 1):
        return dict(interaction(rng, language))
    if kind == 2:
        return rng.choice(_calculation(rng, language))
    phrases, a, b = _PHRASES[language], rng.randrange(12, 90), rng.randrange(12, 90)
    ones, tens = b % 10, b - b % 10
    numbers = {"a": a, "b": b, "tens": tens, "most": a + tens, "ones": ones, "total": a + b}
    query = phrases["sum"].format(**numbers)
    if kind == 3:
        return {"internal": phrases["bare"], "query": query, "answer": f"{a + b}."}
    thinking = phrases["steps"].format(**numbers)
    return {"query": query, "think": thinking, "answer": phrases["total"].format(**numbers)}


def _calculation(rng: random.Random, language: str) -> list[Record]:
    """A question that a tool is called for, and the interaction that its result begins."""
    phrases, a, b = _PHRASES[language], rng.randrange(12, 90), rng.randrange(12, 90)
    numbers = {"a": a, "b": b, "product": a * b}
    call = {"tool": "calculator", "expression": f"{a} * {b}"}
    return [
        {"query": phrases["product"].format(**numbers), "tool_call": call},
        {"tool_result": f"{a} * {b} = {a * b}", "answer": phrases["answer"].format(**numbers)},
    ]


def dialogue(rng: random.Random, language: str) -> Record:
    """Six to eight turns: two or three facts are told, something else is talked about, then the facts are asked for."""
    chosen = rng.sample(facts(rng, language), rng.randrange(2, 4))
    turns: list[Record] = [dict(fact.tell) for fact in chosen]
    turns += _calculation(rng, language)
    turns += [dict(interaction(rng, language)) for _ in range(rng.randrange(2) if len(chosen) == 2 else 0)]
    held = []
    for told in rng.sample(range(len(chosen)), len(chosen)):
        fact = chosen[told]
        held.append({"told": told, "asked": len(turns), "value": fact.value})
        recall = {"think": _PHRASES[language]["recall"].format(told=fact.tell["query"])}
        turns.append({**fact.ask, **(recall if rng.random() < 0.3 else {})})
    return {"interactions": turns, "facts": held}


def write_interactions(out: Path, text_bytes: int, seed: int = 0) -> list[tuple[str, int]]:
    """Write about `text_bytes` of records into `out/single` and `out/dialogues`, a file a language; return (file,
    bytes) of each. The same seed and size give the same bytes.

    Raises:
        DataError: `out` exists and holds something.
    """
    require_new_folder(out)
    require_free_space(out, text_bytes * 3 // 2, "The sample of interactions")
    written = []
    for kind in _KINDS:
        make = single if kind == "single" else dialogue
        for language in LANGUAGES:
            rng = random.Random(f"rxt-interactions-v1|{seed}|{language}|{kind}")
            lines: list[str] = []
            size = 0
            while size < text_bytes // (len(_KINDS) * len(LANGUAGES)) or not lines:
                record = {"language": language, **make(rng, language)}
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
                size += len(lines[-1].encode())
            path = out / kind / f"{language}.jsonl"
            with access_errors(out, f"Delete {out}, which is not whole."):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, "".join(lines))
            written.append((f"{kind}/{path.name}", size))
    return written
