"""Held-out dialogues turn by turn, against sums written out; rows as the run's own evaluation has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answering import network_of
from byte_tokenizer import byte_tokenizer
from saved_run import write_run
from tiny import model_config
from tokenizers import pre_tokenizers
from training_run import build_shards

from data_prep.interactions.build import InteractionRequest, build_interactions
from rxt_dist.config.model import ModelConfig
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.interactions import answer_labels
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.data.text import Text
from rxt_dist.errors import DataError
from rxt_dist.inference import Assistant
from rxt_dist.inference.evaluation import MEMORIES, evaluate_dialogues, evaluate_rows
from rxt_dist.inference.generate import write
from rxt_dist.model.init import initialise
from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer

RECORDS = [
    [("my cat is Tom", "ok"), ("who?", "Tom")],
    [("my dog is Rex", "nice"), ("and it barks", "I see"), ("who barks?", "Rex")],
    [("hi", "hello"), ("bye", "see you")],
    [("one", "two"), ("three", "four")],
    [("a", "b")],
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    lines = [
        {"interactions": [{"query": query, "answer": answer} for query, answer in record], "language": "en"}
        for record in RECORDS
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    alphabet = {char: 11 + number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = byte_tokenizer(folder / "tokenizer.json", SPECIAL_TOKENS | alphabet)
    request = InteractionRequest(
        (folder / "in.jsonl",), folder / "data", tokenizer, seq_len=64, kind="dialogues", eval_fraction=0.9, workers=1
    )
    build_interactions(request)
    return folder / "data"


@pytest.fixture(scope="module")
def assistant(chats: Path) -> Assistant:
    return Assistant(network_of("vocab_size=288"), Text(chats / "tokenizer.json", 288))


def expected_loss(assistant: Assistant, chats: Path, dialogues: int) -> dict[tuple[int, str], list[float]]:
    """loss, targets, hits of each turn and memory, one dialogue at a time."""
    dataset, network = DialogueDataset(chats, "eval"), assistant.network
    memories = [initial_memory(network.config, 1, torch.Generator().manual_seed(number)) for number in range(dialogues)]
    sums: dict[tuple[int, str], list[float]] = {}
    for turn in range(3):
        before = list(memories)
        for number in range(dialogues):
            turns = dataset.dialogue(number)
            if turn >= len(turns):
                continue
            ids, labels = turns[turn], answer_labels(turns[turn][None].astype(np.int64))[0]
            views = before[number], torch.zeros_like(before[0]), before[(number - 1) % dialogues]
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            with torch.no_grad():
                for name, memory in zip(MEMORIES, views, strict=True):
                    hidden = network.decoder(network.embedding(tokens), torch.arange(len(ids))[None], memory).hidden_BTD
                    logits, targets = network.lm_head.logits(hidden)[0], torch.from_numpy(labels)
                    kept = targets != -100
                    found = sums.setdefault((turn, name), [0.0, 0.0, 0.0])
                    found[0] += F.cross_entropy(logits[kept], targets[kept], reduction="sum").item()
                    found[1] += int(kept.sum())
                    found[2] += int((logits[kept].argmax(-1) == targets[kept]).sum())
            memories[number] = write(network, before[number], [ids.tolist()])
    return sums


def test_turns_are_read_with_the_memory_of_those_before(assistant: Assistant, chats: Path) -> None:
    held_out = len(DialogueDataset(chats, "eval"))
    assert held_out >= 4
    found = evaluate_dialogues(assistant, chats, 64)
    expected = expected_loss(assistant, chats, held_out)
    assert [(figures.turn, figures.memory) for figures in found] == sorted(
        expected, key=lambda key: (key[0], MEMORIES.index(key[1]))
    )
    for figures in found:
        loss, targets, hits = expected[figures.turn, figures.memory]
        assert figures.targets == targets
        assert figures.loss == pytest.approx(loss / targets, rel=1e-5)
        assert figures.accuracy == pytest.approx(hits / targets)


def test_groups_count_each_dialogue_once(assistant: Assistant, chats: Path) -> None:
    """Also where the last one would be alone in its group."""
    together = [figures for figures in evaluate_dialogues(assistant, chats, 3) if figures.memory == "true"]
    in_twos = [figures for figures in evaluate_dialogues(assistant, chats, 3, at_once=2) if figures.memory == "true"]
    assert [(f.turn, f.targets) for f in together] == [(f.turn, f.targets) for f in in_twos]
    for one, other in zip(together, in_twos, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_system_prompt_is_written_before_the_first_turn(assistant: Assistant, chats: Path, tmp_path: Path) -> None:
    found = {}
    for name, prompts in {"none": ["", ""], "one": ["Be brief.", ""], "two": ["Be brief.", "Sing."]}.items():
        lines = [
            {"interactions": [{"query": query, "answer": answer} for query, answer in record], "system": prompt,
             "language": "en", "held_out": True}
            for record, prompt in zip(RECORDS, prompts, strict=False)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        request = InteractionRequest(
            (tmp_path / f"{name}.jsonl",), tmp_path / name, chats / "tokenizer.json", 64, kind="dialogues", workers=1
        )
        build_interactions(request)
        figures = evaluate_dialogues(assistant, tmp_path / name, 2)
        found[name] = {(each.turn, each.memory): (each.targets, each.loss) for each in figures}
    for name in ("one", "two"):
        assert {key: targets for key, (targets, _) in found[name].items()} == {
            key: targets for key, (targets, _) in found["none"].items()
        }
        for turn in (0, 1, 2):
            assert found[name][turn, "zero"][1] == pytest.approx(found["none"][turn, "zero"][1], rel=1e-5)
        assert found[name][0, "true"][1] != pytest.approx(found["none"][0, "true"][1], rel=1e-5)
    assert found["one"][0, "true"][1] != pytest.approx(found["two"][0, "true"][1], rel=1e-5)


def test_dialogues_that_do_not_fit(assistant: Assistant, chats: Path, tmp_path: Path) -> None:
    short = Assistant(network_of("vocab_size=288"), assistant.text)
    short.config = short.config.model_copy(update={"seq_len": 32})
    with pytest.raises(DataError, match="turns of up to 64 tokens"):
        evaluate_dialogues(short, chats, 8)
    other = Assistant(network_of("vocab_size=288"), Text(byte_tokenizer(tmp_path / "other.json"), 288))
    with pytest.raises(DataError, match="was made with tokenizer"):
        evaluate_dialogues(other, chats, 8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("shards"))


def rows_network(model: ModelConfig) -> ReactiveTransformer:
    network = ReactiveTransformer(model)
    initialise(network, 1)
    return network


@pytest.mark.slow
def test_rows_are_evaluated_as_in_training(shards: Path, tmp_path: Path) -> None:
    """An export: as joint pre-training does it. A run: by its own stage."""
    model = model_config("vocab_size=600", "seq_len=64")
    text, cpu = Text(shards / "tokenizer.json", 600), torch.device("cpu")
    found = evaluate_rows(tmp_path, rows_network(model), text, shards, 4, cpu)
    assert {evaluation.view for evaluation in found} == {"true", "zero", "foreign"}
    assert {evaluation.source for evaluation in found} == {"en", "pl"}
    assert all(5 < evaluation.losses["ar"] < 9 for evaluation in found)
    write_run(tmp_path / "run", rows_network(model), "joint", data=tmp_path / "gone")
    of_run = evaluate_rows(tmp_path / "run", rows_network(model), text, shards, 4, cpu)
    assert [(one.source, one.view) for one in of_run] == [(one.source, one.view) for one in found]
    with pytest.raises(DataError, match="rows of 64 tokens"):
        evaluate_rows(tmp_path, rows_network(model_config("vocab_size=600", "seq_len=32")), text, shards, 4, cpu)
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_rows(tmp_path, rows_network(model), Text(byte_tokenizer(tmp_path / "t.json"), 600), shards, 4, cpu)
    decoder = ReactiveTransformer(model, ("embedding", "decoder", "lm_head"))
    with pytest.raises(DataError, match="has no encoder, mlm_head"):
        evaluate_rows(tmp_path, decoder, text, shards, 4, cpu)
