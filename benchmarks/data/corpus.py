"""The text that the data benchmarks turn into shards: English documentation and generated Polish, and a tokenizer.

    python benchmarks/data/corpus.py [--megabytes 64]

There is nothing to download: the English is what the packages of the peers' environment say about themselves
(docstrings, README and licence files, each paragraph once), the Polish comes from the sample stories, with words of an
open vocabulary put among theirs (a Zipf distribution over 200,000 stems), since a tokenizer that keeps the words it has
seen would find the stories alone too easy. Paragraphs are joined to documents of log-normal length. Written once, to
benchmarks/.scratch: parquet with row groups of 1,000 documents, the same as jsonl, and a BPE of 32,768 ids. `half/` is
every second document, for what takes long.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers import scratch, site_packages

from data_prep.corpora import Document
from data_prep.synthetic import story
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer

VOCABULARY = 32_768
ROW_GROUP = 1_000
FILES = 4  # a language; more files than workers, so that any tool can share them out
POLISH_SHARE = 0.25
# Characters of a document: the mean is 3,400 in English, about 800 tokens.
_MEAN_CHARACTERS, _SIGMA = 3_400, 1.1
_DOCSTRING = re.compile(r'"""(.{120,}?)"""', re.DOTALL)
_STEMS, _RARE_WORDS = 200_000, 0.12
_SYLLABLES = [
    "ko",
    "wa",
    "rze",
    "pi",
    "sta",
    "mi",
    "no",
    "dzie",
    "szcz",
    "ło",
    "ga",
    "pra",
    "wy",
    "czy",
    "tu",
    "bo",
    "gło",
    "na",
    "stro",
    "lę",
    "ró",
    "że",
    "ni",
    "cie",
    "da",
    "mo",
    "śwa",
    "po",
    "re",
    "zy",
]
_ENDINGS = (
    "",
    "a",
    "y",
    "ę",
    "ą",
    "ie",
    "ów",
    "om",
    "ami",
    "ach",
    "owa",
    "owy",
    "owego",
    "owych",
    "ość",
    "ości",
    "uje",
    "ał",
)


def english_paragraphs() -> Iterator[str]:
    """What the packages of the peers' environment say about themselves, in the order of their paths."""
    root = site_packages()
    for path in sorted(root.rglob("*")):
        if path.suffix not in {".py", ".md", ".rst", ".txt"} and path.name != "METADATA":
            continue
        text = path.read_text(errors="replace")
        blocks = _DOCSTRING.findall(text) if path.suffix == ".py" else [text]
        for block in blocks:
            # The same licence and the same sentence on an argument stand in hundreds of files.
            yield from (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", block))


def polish_paragraphs(seed: int = 0) -> Iterator[str]:
    """Stories in which every eighth word or so is another, from an open vocabulary; endless."""
    rng, ranks = random.Random(seed), np.random.default_rng(seed)
    stems = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) for _ in range(_STEMS)]
    while True:
        for paragraph in story(rng, "pl").split("\n\n"):
            words = paragraph.split(" ")
            for at in range(1, len(words)):
                if rng.random() < _RARE_WORDS:
                    words[at] = stems[int(ranks.zipf(1.2)) % _STEMS] + rng.choice(_ENDINGS)
            yield " ".join(words)


def documents(paragraphs: Iterable[str], characters: int, seed: int) -> Iterator[str]:
    """Distinct paragraphs joined to documents of log-normal length, until this many characters are used."""
    lengths = np.random.default_rng(seed)
    mu = np.log(_MEAN_CHARACTERS) - _SIGMA**2 / 2
    seen: set[int] = set()
    parts: list[str] = []
    held = used = 0
    wanted = lengths.lognormal(mu, _SIGMA)
    for paragraph in paragraphs:
        if len(paragraph) < 40 or hash(paragraph) in seen:
            continue
        seen.add(hash(paragraph))
        while paragraph:
            # A long paragraph is cut at a word where the document is full.
            room = int(wanted) - held
            cut = len(paragraph) if len(paragraph) <= room else paragraph.find(" ", max(room, 40))
            cut = len(paragraph) if cut < 0 else cut
            parts.append(paragraph[:cut])
            held += cut
            paragraph = paragraph[cut:].strip()
            if held >= wanted:
                yield "\n\n".join(parts)
                used += held
                if used >= characters:
                    return
                parts, held, wanted = [], 0, lengths.lognormal(mu, _SIGMA)


def make_corpus(megabytes: int = 64) -> Path:
    """The folder with `parquet/`, `jsonl/`, `tokenizer.json` and `corpus.json`; made on first use."""
    root = scratch(f"corpus-{megabytes}")
    if (root / "corpus.json").is_file():
        return root
    shutil.rmtree(root)
    for folder in ("parquet", "jsonl"):
        (root / folder).mkdir(parents=True)
    sizes = {"en": 1 - POLISH_SHARE, "pl": POLISH_SHARE}
    sources = {"en": english_paragraphs(), "pl": polish_paragraphs()}
    texts: list[Document] = []
    facts: dict[str, int] = {}
    for number, (language, share) in enumerate(sizes.items()):
        made = list(documents(sources[language], int(megabytes * 1e6 * share), number))
        facts |= {f"{language}_documents": len(made), f"{language}_bytes": sum(len(t.encode()) for t in made)}
        facts[f"{language}_distinct_words"] = len({word for text in made for word in text.split()})
        texts += [Document(text, language, "corpus", str(index)) for index, text in enumerate(made)]
        for index in range(FILES):
            _write(root, f"{language}/part-{index:02d}", language, made[index::FILES])
    save_tokenizer(train_tokenizer(iter(texts), VOCABULARY), root / "tokenizer.json")
    for path in [root / "tokenizer.json", *root.glob("*/*-part-00.*"), *root.glob("*/*-part-02.*")]:
        link = root / "half" / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
    (root / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    return root


def _write(root: Path, name: str, language: str, texts: list[str]) -> None:
    rows = [{"id": f"{name}-{i}", "language": language, "text": text} for i, text in enumerate(texts)]
    flat = name.replace("/", "-")
    pq.write_table(pa.Table.from_pylist(rows), root / "parquet" / f"{flat}.parquet", row_group_size=ROW_GROUP)
    with open(root / "jsonl" / f"{flat}.jsonl", "w") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Parse the arguments, make the corpus, say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="text in MB (default 64)")
    root = make_corpus(parser.parse_args().megabytes)
    print(root, (root / "corpus.json").read_text(), sep="\n")


if __name__ == "__main__":
    main()
