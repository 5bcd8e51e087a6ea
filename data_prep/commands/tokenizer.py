"""`rxt-dist data tokenizer`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import JSON, emit, print_table, say
from data_prep.commands.corpus import CORPUS, read_corpus
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_prep.corpora import Document
    from data_prep.tokenizing.sample import TrainingSample
    from data_prep.tokenizing.takeover import Check
    from data_prep.units import Unit
    from rxt_dist.config.corpus import BuildConfig

_LARGEST_BYTES = 8_000_000  # of a tokenizer.json with 65,536 ids; found out before and not after an hour of training


VOCAB_SIZE = typer.Option(
    None,
    metavar="IDS",
    help="Number of ids, control tokens included; from 267 to 65,536.",
    show_default="4096, or build.vocab_size of DATA.yaml",
)
WEIGHT = typer.Option(
    [], help="NAME=NUMBER: share of a language or of a source of DATA.yaml in the sample; repeat it for each."
)
SAMPLE_MB = typer.Option(
    64.0,
    min=0.01,
    metavar="MB",
    help="Text in MB to train on of each language, or of the language or source with the largest --weight.",
)


def tokenizer(
    inputs: list[str] = CORPUS,
    out: Path = typer.Option(Path("tokenizer.json"), help="Where to write the tokenizer."),
    vocab_size: int | None = VOCAB_SIZE,
    weight: list[str] = WEIGHT,
    sample_mb: float = SAMPLE_MB,
    report: Path | None = typer.Option(None, help="Folder for report.json and pictures."),
    compare: list[Path] = typer.Option([], help="Another tokenizer.json to measure beside it; repeat it for more."),
    import_file: Path | None = typer.Option(
        None, "--import", help="Train nothing: check this tokenizer.json, and write it to --out if it can be used."
    ),
    as_json: bool = JSON,
) -> None:
    """Train a byte-level BPE tokenizer on text, or check one; report how well it fits each language.

    Example: `rxt-dist data tokenizer my_texts/ --out tokenizer.json --vocab-size 32768`. Few tokens a word are good:
    they make rows hold more text. The sample is taken from all over the corpus.

    More say for one language: `rxt-dist data tokenizer DATA.yaml --weight en=0.7 --weight pl=0.3 --sample-mb 256`
    takes 256 MB of English and 110 MB of Polish. Without weights each language gives as much as it has, up to 64 MB.

    Look closer: `--report DIR` writes report.json and pictures: fertility and compression by language and source,
    lengths, unused entries, a round trip of every plane of Unicode; `--compare other.json` puts others beside it.

    Take one over: `rxt-dist data tokenizer my_texts/ --import other.json --out tokenizer.json` checks what training
    relies on, with every character of Unicode and with your texts, and says of each problem what to do.
    """
    from data_prep.tokenizing import report as measure

    _require_no_text(out)
    _require_places(out, report)
    if import_file is not None and (weight or vocab_size is not None):
        raise ConfigError("--import trains nothing, so --weight and --vocab-size cannot stand beside it.")
    others = {name: measure.open_other(path) for name, path in _names(compare, out).items()}
    build, units = read_corpus(inputs)
    value: dict[str, Any] = {"tokenizer": str(out)}
    wanted = vocab_size if vocab_size is not None else build.vocab_size
    if import_file is None:
        ready, sample, value["sha256"] = _train(build, units, wanted, weight, sample_mb, out)
        value["sample"] = {name: {"bytes": size, "share": _share(size, sample)} for name, size in sample.taken.items()}
    else:
        ready, checks, value["sha256"] = _import(import_file, out, units)
        value["checks"] = [check.to_dict() for check in checks]
    say("Measuring how it fits")
    texts = measure.gather(_report_documents(units))
    value["vocab_size"] = ready.get_vocab_size()
    if import_file is None:
        value["vocab_size_wanted"] = wanted
    value["languages"] = {item.language: item.to_dict() for item in measure.fit_report(ready, texts)}
    if report is not None:
        figures = measure.tokenizer_report(ready, texts, others)
        value["compared"] = figures["compared"]
        value["report"] = [str(report / name) for name in measure.write_report(figures, out.stem, report)]
    else:
        value["compared"] = {name: measure.fit_figures(other, texts) for name, other in others.items()}
    emit(as_json, value, lambda: _print(value, wanted))


def _require_places(out: Path, report: Path | None) -> None:
    """Refuse, before anything is trained, to write where nothing can be written."""
    from rxt_dist.files import require_file_place, require_folder, require_free_space

    require_file_place(out)
    require_free_space(out.parent, _LARGEST_BYTES, "The tokenizer")
    if report is not None:
        require_folder(report)


def _require_no_text(out: Path) -> None:
    """Refuse a name under which the next run would read the tokenizer as text, if it does not replace a text now."""
    from data_prep.readers import SUFFIXES

    if out.name.lower().endswith(SUFFIXES):
        raise ConfigError(f"--out is {out}, which would be read as text. A tokenizer is JSON: name a .json file.")


def _train(
    build: BuildConfig, units: tuple[Unit, ...], vocab_size: int, weight: list[str], sample_mb: float, out: Path
) -> tuple[Tokenizer, TrainingSample, str]:
    from data_prep.corpora import ReadCounts
    from data_prep.tokenizing.sample import TrainingSample, parse_weights, spread_documents
    from data_prep.tokenizing.tokenizer import require_vocabulary_size, save_tokenizer, train_tokenizer

    require_vocabulary_size(vocab_size)
    weights, by = parse_weights(weight, [source.name for source in build.sources])
    sample = TrainingSample(weights, by, int(sample_mb * 1e6))
    say(f"Training {vocab_size} ids on up to {sample_mb:g} MB a {by}")
    documents = spread_documents(units, sample, ReadCounts())
    trained = train_tokenizer(documents, vocab_size, sample, None if sys.stderr.isatty() else say)
    return trained, sample, save_tokenizer(trained, out)


def _import(path: Path, out: Path, units: tuple[Unit, ...]) -> tuple[Tokenizer, list[Check], str]:
    from data_prep.tokenizing.report import gather
    from data_prep.tokenizing.takeover import import_tokenizer
    from data_prep.tokenizing.tokenizer import load_tokenizer

    texts = gather(_report_documents(units))
    checks, sha256 = import_tokenizer(path, out, [text for of_key in texts.values() for text in of_key])
    return load_tokenizer(out), checks, sha256


def _names(compare: list[Path], out: Path) -> dict[str, Path]:
    """What to call each file: its name without the suffix where that tells it from the others, else its path."""
    stems = [path.stem for path in [out, *compare]]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in compare}


def _report_documents(units: tuple[Unit, ...]) -> Iterator[Document]:
    """Documents from all over the corpus; some MB of each source are enough to measure on."""
    from data_prep.corpora import ReadCounts
    from data_prep.tokenizing.sample import TrainingSample, spread_documents

    return spread_documents(units, TrainingSample(max_bytes=8 << 20), ReadCounts())


def _share(size: int, sample: TrainingSample) -> float:
    return round(size / sum(sample.taken.values()), 3)


def _print(value: dict[str, Any], wanted: int) -> None:
    from data_prep.tokenizing.tokenizer import smaller_than_wanted

    figures = ("documents", "tokens_per_word", "bytes_per_token", "round_trip_failures")
    everyone = {Path(value["tokenizer"]).name: value} | value["compared"]
    rows = [
        [language, *(str(row[figure]) for figure in figures), f"{name} ({of_one['vocab_size']} ids)"]
        for name, of_one in everyone.items()
        for language, row in of_one["languages"].items()
    ]
    columns = ["language", "documents", "tokens a word", "bytes a token", "round trips failed", "tokenizer"]
    compared = len(everyone) > 1
    print_table(
        f"{value['tokenizer']}: {value['vocab_size']} ids, sha256 {value['sha256'][:16]}",
        columns if compared else columns[:-1],
        sorted(rows) if compared else [row[:-1] for row in rows],
    )
    for name, taken in value.get("sample", {}).items():
        print(f"Trained on {taken['bytes'] / 1e6:.1f} MB of {name} ({100 * taken['share']:.0f} %).")
    if "checks" in value:
        print(f"All {len(value['checks'])} checks passed: {', '.join(check['name'] for check in value['checks'])}.")
    elif too_small := smaller_than_wanted(value["vocab_size"], wanted):
        print(too_small)
    if "report" in value:
        print(f"Wrote {', '.join(value['report'])}.")
