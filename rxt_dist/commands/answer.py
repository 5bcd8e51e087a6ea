"""`rxt-dist chat`, `generate` and `evaluate`: what a trained model says, and how well it does."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson

if TYPE_CHECKING:
    import torch

    from rxt_dist.inference import Assistant

Place = Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="Run directory, or what `rxt-dist export` made.")]
TokenizerFile = Annotated[Path | None, typer.Option(help="tokenizer.json, in the place of the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")]
DType = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Temperature = Annotated[float, typer.Option(help="0: the most probable token.")]
TopK = Annotated[int, typer.Option(help="Only so many of the most probable tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the most probable tokens that come to this probability.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer; default: what a row has room for.")]
Seed = Annotated[int, typer.Option(help="Of first memory and sampling.")]
_DTYPES = ("float32", "bfloat16")
_DEVICES = ("cpu", "cuda")


def chat(
    place: Place,
    system: Annotated[str | None, typer.Option(help="Instructions for the whole conversation.")] = None,
    mode: Annotated[str, typer.Option(help="answer, think, or auto: the model chooses.")] = "answer",
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = "float32",
    tokenizer: TokenizerFile = None,
) -> None:
    """Talk with a model turn by turn; /help lists the commands. Ctrl-C ends an answer, and at the prompt the chat.

    Example: rxt-dist chat exports/mine --temperature 0.5
    """
    from rxt_dist.errors import ConfigError
    from rxt_dist.inference import Sampling
    from rxt_dist.inference.chat import Chat
    from rxt_dist.inference.prompts import MODES

    if mode not in MODES:
        raise ConfigError(f"--mode is '{mode}', but it is one of {', '.join(MODES)}.")
    sampling = Sampling(temperature, top_k, top_p, max_tokens)
    assistant = _assistant(place, device, dtype, tokenizer)

    def read() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    Chat(assistant, sampling, read, write, seed=seed, mode=mode, system=system).run()


def generate(
    place: Place,
    prompts: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='A line: {"query": ...} or {"turns": [...]}.')],
    out: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="File to write: the lines with their answers.")],
    at_once: Annotated[int, typer.Option("--batch", min=1, help="Conversations answered at once.")] = 8,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = "float32",
    tokenizer: TokenizerFile = None,
) -> None:
    """Answer a file of prompts and conversations; each line has a memory of its own.

    A turn is {"query" or "tool_result": ..., "internal": ..., "mode": answer|think|auto}. Everything is checked before
    the first answer; OUT.jsonl is there when all are.

    Example: rxt-dist generate exports/mine questions.jsonl --out answers.jsonl
    """
    from rxt_dist.files import access_errors, require_file_place, write_atomic
    from rxt_dist.inference import Sampling
    from rxt_dist.inference.batch import answer_all, read_conversations

    sampling = Sampling(temperature, top_k, top_p, max_tokens)
    require_file_place(out)
    assistant = _assistant(place, device, dtype, tokenizer)
    conversations = read_conversations(prompts, assistant)

    def report(line: str) -> None:
        typer.echo(line, err=True)

    found = answer_all(assistant, conversations, sampling, at_once=at_once, seed=seed, report=report)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    with access_errors(out, "The answers were not written."):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)
    typer.echo(f"{out}: {len(conversations):,} conversations")


def evaluate(
    place: Place,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Dataset of `rxt-dist data build` or `interactions`.")],
    rows: Annotated[int, typer.Option(min=2, help="Held-out rows or dialogues of each source, at most.")] = 64,
    recall: Annotated[
        bool, typer.Option("--recall", help="Of dialogues of `data recall`: let it answer, and count what it recalls.")
    ] = False,
    source: Annotated[
        list[str] | None, typer.Option(help="With --recall, a source to read; may be repeated. Default: all.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="With --recall: conversations of each source to print.")] = 0,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = "float32",
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Losses and accuracies on held-out data, with the true memory, none, and another one's.

    Dialogues are read turn by turn, and each turn is written into the memory. Rows are evaluated as the run's stage
    does it while training; those of an export as the default stage does. With --recall the model answers by itself
    (greedily), what it said is written, and an answer counts if it holds what was told.

    Example: rxt-dist evaluate runs/mine data/chats
    """
    from rxt_dist.data.dialogues import DialogueManifest, load_any_manifest
    from rxt_dist.errors import ConfigError
    from rxt_dist.inference import Assistant
    from rxt_dist.inference.evaluation import evaluate_dialogues, evaluate_rows
    from rxt_dist.inference.load import load_network

    if not recall and (source or show):
        raise ConfigError("--source and --show belong to --recall: add it, or leave them out.")
    chosen, kind = _device(device), _dtype(dtype)
    is_dialogues = isinstance(load_any_manifest(data), DialogueManifest)
    network, text = load_network(place, tokenizer, lambda line: typer.echo(line, err=True))
    if recall:
        _recall(Assistant(network, text, chosen, kind), data, source, rows, show, seed, as_json)
    elif is_dialogues:
        turns = evaluate_dialogues(Assistant(network, text, chosen, kind), data, rows, seed=seed)
        _print([vars(turn) | {"perplexity": turn.perplexity} for turn in turns], as_json, _turn_line)
    else:
        import torch

        found = evaluate_rows(place, network, text, data, rows, torch.device(chosen))
        _print([vars(one) for one in found], as_json, _row_line)


def _recall(
    assistant: Assistant, data: Path, chosen: list[str] | None, dialogues: int, show: int, seed: int, as_json: bool
) -> None:
    from rxt_dist.inference.recall import converse, recall_by_distance, sources_that_recall

    found, shown = [], []
    for source in chosen or sources_that_recall(data):
        conversations = list(converse(assistant, data, source, dialogues, seed=seed))
        found += recall_by_distance(source, conversations)
        shown += [(source, conversation) for conversation in conversations[:show]]
    if as_json:
        talks = [{"source": source, "turns": [vars(turn) for turn in turns]} for source, turns in shown]
        figures = [vars(one) | {"recall": one.recall} for one in found]
        typer.echo(json.dumps({"recall": figures, "conversations": talks}, ensure_ascii=False))
        return
    for source, turns in shown:
        typer.echo(f"\n{source}")
        for number, turn in enumerate(turns, 1):
            typer.echo(f"{number:>3}  {turn.query}\n     -> {turn.said['true']}")
            for memory in [name for name in turn.said if name != "true"]:
                typer.echo(f"        {memory} memory: {turn.said[memory]}")
    typer.echo("")
    for (source, distance), group in groupby(found, key=lambda one: (one.source, one.distance)):
        of = list(group)
        shares = "  ".join(f"{one.memory} {one.recall:6.1%}" for one in of)
        typer.echo(f"{source:<24} told {distance:>2} turns before: recalled with memory {shares}  of {of[0].asked:,}")


def _print(records: list[dict[str, Any]], as_json: bool, line: Any) -> None:
    if as_json:
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    for record in records:
        typer.echo(line(record))


def _turn_line(record: dict[str, Any]) -> str:
    return (
        f"{record['source']:<16} turn {record['turn'] + 1:>2}  {record['memory']:<8} loss {record['loss']:7.4f}  "
        f"perplexity {record['perplexity']:9.2f}  accuracy {record['accuracy']:6.1%}  of {record['targets']:,} tokens"
    )


def _row_line(record: dict[str, Any]) -> str:
    losses = "  ".join(f"{name} loss {value:.4f}" for name, value in record["losses"].items())
    accuracies = "  ".join(f"{name} accuracy {value:.1%}" for name, value in record["accuracies"].items())
    return f"{record['source']:<16} {record['view']:<8} {losses}  {accuracies}  of {record['rows']:,} rows"


def _assistant(place: Path, device: str | None, dtype: str, tokenizer: Path | None) -> Assistant:
    from rxt_dist.inference import Assistant

    chosen, kind = _device(device), _dtype(dtype)
    return Assistant.load(place, chosen, kind, tokenizer)


def _device(name: str | None) -> str:
    import torch

    from rxt_dist.errors import ConfigError

    there = torch.cuda.is_available()
    if name is None:
        return "cuda" if there else "cpu"
    if name not in _DEVICES:
        raise ConfigError(f"--device is '{name}', but it is one of {', '.join(_DEVICES)}.")
    if name == "cuda" and not there:
        raise ConfigError("--device is cuda, but this machine has no GPU that torch can use. Leave it out.")
    return name


def _dtype(name: str) -> torch.dtype:
    import torch

    from rxt_dist.errors import ConfigError

    if name not in _DTYPES:
        raise ConfigError(f"--dtype is '{name}', but it is one of {', '.join(_DTYPES)}.")
    return torch.bfloat16 if name == "bfloat16" else torch.float32
