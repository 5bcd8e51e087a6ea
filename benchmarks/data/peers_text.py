"""The peers' side of text_to_shards.py: one of them turns the corpus into its own files; runs in their environment.

    python benchmarks/data/peers_text.py PEER CORPUS OUT

- datatrove: ParquetReader and DocumentTokenizer in a LocalPipelineExecutor, without its shuffle.
- datasets: load parquet, and the usual two calls of `map`: a tokenizer of `transformers` on batches, then concatenate
  the lists and cut them into rows; save_to_disk. datasets-tuned: only ids, in 16 bits and numpy, from `tokenizers`.
- megatron: what its preprocess_data.py does, which is not in the package: a pool encodes documents one by one from
  jsonl, the parent writes them with IndexedDatasetBuilder.
- megatron-fast: the same builder in one process, documents encoded by `tokenizers` in batches.
- megatron-fastokens: the same, encoded by `fastokens`, an exact and much faster library.

All write flat tokens with EOS after each document; none fits documents into rows, and none writes checksums.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from cost import Cost, peak_mb

SEQ_LEN = 8192
EOS = 3


def run_datatrove(corpus: Path, out: Path) -> Callable[[], int]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    steps = [
        ParquetReader(str(corpus / "parquet"), read_metadata=False),
        DocumentTokenizer(
            str(out / "tokens"), str(corpus / "tokenizer.json"), eos_token="[EOS]", shuffle_documents=False
        ),
    ]

    def work() -> int:
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out / "logs")).run()
        return sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2

    return work


def run_datasets(corpus: Path, out: Path) -> Callable[[], int]:
    from transformers import PreTrainedTokenizerFast

    file = str(corpus / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="[EOS]", model_max_length=1 << 30)

    def encode(batch: dict[str, list[Any]]) -> Any:
        return tokenizer([text + "[EOS]" for text in batch["text"]], return_token_type_ids=False)

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        flat = {name: list(chain(*lists)) for name, lists in batch.items()}
        whole = len(flat["input_ids"]) // SEQ_LEN * SEQ_LEN
        return {name: [ids[at : at + SEQ_LEN] for at in range(0, whole, SEQ_LEN)] for name, ids in flat.items()}

    return lambda: _map_twice(corpus, out, encode, cut)


def run_datasets_tuned(corpus: Path, out: Path) -> Callable[[], int]:
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    ids = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*item.ids, EOS] for item in tokenizer.encode_batch_fast(batch["text"])]}

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        flat = np.concatenate(batch["input_ids"])
        return {"input_ids": list(flat[: len(flat) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN))}

    return lambda: _map_twice(corpus, out, encode, cut, features=ids, form="numpy")


def _map_twice(
    corpus: Path, out: Path, encode: Callable[..., Any], cut: Callable[..., Any], features: Any = None, form: Any = None
) -> int:
    import datasets

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in (corpus / "parquet").glob("*.parquet"))
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(out / "cache"), columns=["text"])
    encoded = loaded.map(encode, batched=True, remove_columns=["text"], features=features)
    encoded.with_format(form).map(cut, batched=True, features=features).save_to_disk(str(out / "rows"))
    return sum(len(chunk.values) for chunk in encoded.data.column("input_ids").chunks)


def _lines(corpus: Path) -> Iterator[str]:
    for path in sorted((corpus / "jsonl").glob("*.jsonl")):
        with open(path) as lines:
            yield from lines


_TOKENIZER: Any = None


def _open_tokenizer(file: str) -> None:
    global _TOKENIZER
    from tokenizers import Tokenizer

    _TOKENIZER = Tokenizer.from_file(file)


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = [*_TOKENIZER.encode(json.loads(line)["text"]).ids, EOS]
    return ids, len(ids)


def run_megatron(corpus: Path, out: Path) -> Callable[[], int]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def work() -> int:
        tokens = 0
        builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.uint16)
        with multiprocessing.Pool(1, _open_tokenizer, (str(corpus / "tokenizer.json"),)) as pool:
            for ids, length in pool.imap(_encode_line, _lines(corpus), 32):
                builder.add_document(ids, [length])
                tokens += length
            pool.close()
            pool.join()
        builder.finalize(str(out / "text.idx"))
        return tokens

    return work


def run_megatron_fast(corpus: Path, out: Path, library: str = "tokenizers") -> Callable[[], int]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encode = _fastokens(corpus) if library == "fastokens" else _tokenizers(corpus)

    def work() -> int:
        tokens = 0
        builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.uint16)
        lines = _lines(corpus)
        while batch := [json.loads(line)["text"] for line in islice(lines, 1000)]:
            for ids in encode(batch):
                ids.append(EOS)
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
        builder.finalize(str(out / "text.idx"))
        return tokens

    return work


def _tokenizers(corpus: Path) -> Callable[[list[str]], list[list[int]]]:
    _open_tokenizer(str(corpus / "tokenizer.json"))
    return lambda texts: [item.ids for item in _TOKENIZER.encode_batch_fast(texts)]


def _fastokens(corpus: Path) -> Callable[[list[str]], list[list[int]]]:
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    return lambda texts: [item.ids for item in tokenizer.encode_batch(texts)]


PEERS: dict[str, Callable[[Path, Path], Callable[[], int]]] = {
    "datatrove": run_datatrove,
    "datasets": run_datasets,
    "datasets-tuned": run_datasets_tuned,
    "megatron": run_megatron,
    "megatron-fast": run_megatron_fast,
    "megatron-fastokens": lambda corpus, out: run_megatron_fast(corpus, out, "fastokens"),
}


def main() -> None:
    """Parse the arguments, work, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("corpus", type=Path, help="folder that corpus.py wrote")
    parser.add_argument("out", type=Path, help="empty folder")
    arguments = parser.parse_args()
    work = PEERS[arguments.peer](arguments.corpus, arguments.out)
    with Cost() as cost:
        tokens = work()
    result = {"tokens": tokens, "cpu_s": cost.cpu_s, "wall_s": cost.wall_s, "peak_mb": peak_mb()}
    print(json.dumps(result | {"mtok_per_cpu_s": tokens / cost.cpu_s / 1e6}))


if __name__ == "__main__":
    main()
