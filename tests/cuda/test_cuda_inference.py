"""Answers on the device: the reference's three interactions, and sessions that go from one device to the other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from measures import BFLOAT16_SAME_EXPERTS, FLOAT32, distance

# What loads a model loads datasets too, and an export its tokenizer.
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

from answering import assistant_of, network_of, reference_network, vectors

from rxt_dist.data.text import Text
from rxt_dist.inference import Assistant, Sampling
from rxt_dist.inference.generate import Row, answer, write


def test_three_interactions_of_the_reference(device: torch.device) -> None:
    network, expected = copy.deepcopy(reference_network()).to(device), vectors("generate")
    memory = write(network, expected["stm0"].to(device), expected["init.ids"].tolist())
    assert distance(memory, expected["init.stm"]) < FLOAT32
    for turn in ("turn0", "turn1", "turn2"):
        prompt, logits = expected[f"{turn}.prompt"][0].tolist(), []
        sampling = Sampling(max_tokens=20, suppress=False)
        row = Row(prompt[:-1], prompt[-1], sampling, torch.Generator(), frozenset())
        for _ in answer(network, memory, [row], lambda _, of_token, kept=logits: kept.append(of_token.clone())):
            pass
        assert row.said[1:] == expected[f"{turn}.generated"].tolist()
        assert distance(torch.stack(logits), expected[f"{turn}.logits"]) < FLOAT32
        memory = write(network, memory, [row.written])
        assert distance(memory, expected[f"{turn}.stm_after"]) < FLOAT32


def test_a_session_goes_from_the_cpu_to_the_device(device: torch.device, tmp_path: Path) -> None:
    on_cpu = assistant_of(tmp_path)
    there = Assistant(network_of(), on_cpu.text, device)
    session = on_cpu.session(seed=3)
    on_cpu.answer([session], ["hello"], Sampling(max_tokens=8))
    session.save(tmp_path / "session")
    moved = there.load_session(tmp_path / "session")
    for query in ("who?", "why?"):
        sampling = Sampling(temperature=0.5, max_tokens=8)
        assert there.answer([moved], [query], sampling) == on_cpu.answer([session], [query], sampling)
        assert distance(moved.memory, session.memory) < FLOAT32


def test_bfloat16_on_the_device(device: torch.device, tmp_path: Path) -> None:
    wide = assistant_of(tmp_path)
    narrow = Assistant(network_of(), Text(wide.text.path, 128), device, torch.bfloat16)
    sessions = wide.session(seed=1), narrow.session(seed=1)
    for session, assistant in zip(sessions, (wide, narrow), strict=True):
        assistant.tell(session, "my cat", "is Mruczek")
    assert distance(sessions[1].memory, sessions[0].memory) < BFLOAT16_SAME_EXPERTS
    assert narrow.answer([sessions[1]], ["who?"], Sampling(max_tokens=8))[0].ids
