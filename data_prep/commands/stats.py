"""`rxt-dist data stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import DATASET, JSON, emit, print_summary, print_table, progress_bytes, say, summary
from data_prep.commands.order import order_of, require_end
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.data.dialogues import AnyManifest, DialogueManifest
    from rxt_dist.data.manifest import DatasetManifest
    from rxt_dist.data.sampler import GlobalOrder


def stats(
    dataset: Path = DATASET,
    plots: Path | None = typer.Option(None, help="Folder for pictures (PNG) of the main figures."),
    sample: int | None = typer.Option(
        None, min=1, help="Scan so many rows of each source; default: all up to 2 billion tokens, else 16,384."
    ),
    whole: bool = typer.Option(False, "--whole", help="Scan all rows, however many there are."),
    run: Path | None = typer.Option(None, help="A run or data file: epochs under its mixture and token budget."),
    workers: int | None = typer.Option(None, min=1, help="Processes that scan; default: one a core."),
    as_json: bool = JSON,
) -> None:
    """What is in a dataset: sizes, lengths, padding, ids, duplicates, shares; with --run, epochs too.

    Sizes and shares come from the manifest; lengths, ids and duplicates from scanning rows, whose tokens and
    segment lengths are compared with their checksums. A sample cannot tell duplicates, leakage and ids that are never
    used: these are null unless all rows were scanned (--whole). Of dialogues it tells turns, their lengths, doubles,
    and how many turns recall something, by distance.
    Example: `rxt-dist data stats data/mine --plots figures/`.
    """
    import time

    from data_prep.shards.statistics import SAMPLE_ROWS, WHOLE_TOKENS, scan_dataset, statistics
    from data_prep.tokenizing.tokenizer import load_tokenizer
    from rxt_dist.data.dialogues import DialogueManifest, load_any_manifest
    from rxt_dist.data.manifest import TOKENIZER_FILE
    from rxt_dist.files import require_folder

    manifest = load_any_manifest(dataset)
    if isinstance(manifest, DialogueManifest):
        if plots is not None or sample is not None:
            raise ConfigError(
                f"{dataset} holds dialogues, which are few and read whole; there are no pictures of them. Leave out "
                f"--plots and --sample."
            )
        _of_dialogues(dataset, manifest, run, as_json)
        return
    if plots is not None:
        require_folder(plots)
    tokenizer = load_tokenizer(dataset / TOKENIZER_FILE)
    order = _order(dataset, manifest, run) if run is not None else None
    if sample is None and not whole and manifest.totals.tokens > WHOLE_TOKENS:
        sample = SAMPLE_ROWS
        say(f"{manifest.totals.tokens:,} tokens: scanning a sample of {sample:,} rows a source (--whole scans all).")
    row_bytes, started = 2 * manifest.seq_len, time.monotonic()
    with progress_bytes("Scanning") as progress:
        scans = scan_dataset(
            dataset, manifest, sample, workers, lambda done, total: progress(done * row_bytes, total * row_bytes)
        )
    figures = statistics(manifest, scans, lambda token: tokenizer.decode([token], skip_special_tokens=False))
    figures["scanned"]["seconds"] = round(time.monotonic() - started, 3)
    # Without a run nobody has said how often anything is read.
    plan = _plan(order) if order is not None else None
    value = summary(dataset, manifest) | figures | {"mixture": plan}
    if plots is not None:
        from data_prep.shards.plots import draw_statistics

        value["plots"] = [str(path) for path in draw_statistics(figures, plan, scans, plots)]
    emit(as_json, value, lambda: _show(dataset, manifest, value))


def _of_dialogues(dataset: Path, manifest: DialogueManifest, run: Path | None, as_json: bool) -> None:
    from data_prep.shards.dialogue_statistics import dialogue_statistics

    order = _order(dataset, manifest, run) if run is not None else None
    with progress_bytes("Reading") as progress:
        # Dialogues are of about one size, so that their share of all is that of the bytes.
        size = sum(shard.bytes for shard in manifest.shards())
        figures = dialogue_statistics(dataset, manifest, lambda done, total: progress(size * done // total, size))
    plan = _plan(order) if order is not None else None
    value = summary(dataset, manifest)
    for name, source in figures["sources"].items():
        value["sources"][name] |= source
    emit(as_json, value | {"mixture": plan}, lambda: _show_dialogues(dataset, manifest, value["sources"], plan))


def _show_dialogues(
    dataset: Path, manifest: DialogueManifest, sources: dict[str, Any], plan: list[dict[str, Any]] | None
) -> None:
    epochs = {item["source"]: item["epochs"] for item in plan or ()}
    rows = []
    for name, source in sources.items():
        turns, tokens = source["turns"], source["turn_tokens"]
        figures = [f"{turns.get('mean', 0):.1f}", f"{turns.get('longest', 0):,}"]
        figures += [f"{tokens.get(key, 0):,.0f}" for key in ("mean", "p99", "longest")]
        totals = [f"{source[split]['dialogues']:,}" for split in ("train", "eval")]
        recalls = " ".join(f"{distance}:{count:,}" for distance, count in source["recalls"].items())
        rows.append([name, *totals, f"{100 * source['share']:.2f} %", *figures, f"{source['duplicates']:,}",
                     recalls or "-", *([f"{epochs[name]:.2f}"] if epochs else [])])  # fmt: skip
    heads = ["source", "dialogues", "held out", "share", "turns", "most", "tokens a turn", "99 %", "longest", "doubles",
             "recalls by distance", *(["epochs"] if epochs else [])]  # fmt: skip
    print_table(
        f"{dataset}: turns of at most {manifest.seq_len} tokens, digest {manifest.root_digest[:16]}", heads, rows
    )
    leaked = sum(source["held_out_also_in_training"] for source in sources.values())
    print(f"Held-out dialogues that stand in training too, of whatever source: {leaked:,}.")


def _plan(order: GlobalOrder) -> list[dict[str, Any]]:
    return [{"source": item.name, "tokens": item.tokens, "epochs": item.epochs} for item in order.plan()]


def _order(dataset: Path, manifest: AnyManifest, run: Path) -> GlobalOrder:
    order, _, config = order_of(dataset, manifest, run, None)
    if config is None:
        from rxt_dist.config.load import load_data

        require_end(load_data(run), None, run, "name the run file")
    return order


def _show(dataset: Path, manifest: DatasetManifest, value: dict[str, Any]) -> None:
    print_summary(dataset, manifest)
    scanned = value["scanned"]
    extent = "all rows" if scanned["whole"] else "a sample of the rows"
    print(f"Scanned {extent}: {scanned['rows']:,} rows, {scanned['tokens']:,} tokens, in {scanned['seconds']:.1f} s.")
    rows = []
    epochs = {item["source"]: item["epochs"] for item in value["mixture"] or ()}
    for name, source in value["sources"].items():
        lengths, duplicates = source["lengths"], source["duplicates"]
        figures = [f"{lengths.get(key, 0):,.0f}" for key in ("mean", "p50", "p99", "longest")]
        rows.append(
            [name, f"{100 * source['share']:.2f} %", *figures,
             f"{100 * duplicates['rate']:.2f} %" if duplicates else "-",
             *([f"{epochs[name]:.2f}"] if epochs else [])]
        )  # fmt: skip
    print_table(
        "Documents (lengths in tokens)" + (" and training" if epochs else ""),
        ["source", "share", "mean", "median", "99 %", "longest", "doubles", *(["epochs"] if epochs else [])],
        rows,
    )
    ids = value["ids"]
    shares = ", ".join(f"{name} {100 * entry['share']:.1f} %" for name, entry in value["languages"].items())
    print(f"Languages: {shares}.")
    _show_whole(value)
    print(
        f"In the rows scanned: {ids['unknown']:,} unknown ids; most frequent are "
        f"{', '.join(repr(item['text']) for item in ids['top'][:15])}."
    )
    for path in value.get("plots", []):
        print(f"Drew {path}")


def _show_whole(value: dict[str, Any]) -> None:
    """What only a scan of all rows can tell."""
    ids, duplicates = value["ids"], value["duplicates"]
    leaked = [source["held_out_also_in_training"] for source in value["sources"].values()]
    if duplicates is None or None in leaked:
        print(
            "Exact duplicates, held-out documents that stand in training too, and ids that are never used need a scan "
            "of all rows: --whole."
        )
        return
    print(
        f"Exact duplicates over all sources: {duplicates['duplicates']:,} of {duplicates['documents']:,} documents; "
        f"held-out documents that stand in training too, of whatever source: {sum(leaked):,}."
    )
    print(f"Ids: {ids['unused']:,} of {ids['vocabulary']:,} never used, {ids['used_once']:,} used once.")
