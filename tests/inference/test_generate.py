"""Answers token by token: the reference's numbers, and the same as computing everything again for each token."""

from __future__ import annotations

import pytest
import torch
from answering import VARIANTS, network_of, reference_network, vectors
from torch import Tensor

from rxt_dist.data.interactions import ANSWER_ID, THINK_ID
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.inference.generate import Row, answer, write
from rxt_dist.inference.sampling import Sampling
from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer

CONTROLS = frozenset(SPECIAL_TOKENS.values())
PROMPTS = ((2, 5, 51, 28, 25, 68, 25), (2, 10, 50, 5, 57), (2, 9, 11, 64, 53, 69, 31, 60, 27, 33, 34))


def row(prompt: tuple[int, ...], mode: int | None = ANSWER_ID, sampling: Sampling | None = None, seed: int = 0) -> Row:
    sampling = sampling or Sampling(max_tokens=12)
    return Row(prompt, mode, sampling, torch.Generator().manual_seed(seed), CONTROLS)


def run(network: ReactiveTransformer, memory: Tensor, rows: list[Row]) -> list[Tensor]:
    """Answer all rows; the logits of each, [tokens, V]."""
    seen: list[list[Tensor]] = [[] for _ in rows]
    for _ in answer(network, memory, rows, lambda number, logits: seen[number].append(logits.clone())):
        pass
    return [torch.stack(of_row) for of_row in seen]


def uncached(network: ReactiveTransformer, memory: Tensor, ids: list[int]) -> Tensor:
    """Logits [tokens, V] at every place of an interaction, computed at once."""
    ids_1T, positions_1T = torch.tensor([ids]), torch.arange(len(ids))[None]
    with torch.no_grad():
        hidden = network.decoder(network.embedding(ids_1T), positions_1T, memory).hidden_BTD
        return network.lm_head.logits(hidden)[0]


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    worst, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert worst <= 1e-5 * largest, f"{what}: off by {worst:.2e} of {largest:.2e}"


def test_three_interactions_of_the_reference() -> None:
    network, expected = reference_network(), vectors("generate")
    memory = write(network, expected["stm0"], expected["init.ids"].tolist())
    assert_close(memory, expected["init.stm"], "first memory")
    for turn in ("turn0", "turn1", "turn2"):
        prompt = expected[f"{turn}.prompt"][0].tolist()
        asked = row(tuple(prompt[:-1]), prompt[-1], Sampling(max_tokens=20, suppress=False))
        (logits,) = run(network, memory, [asked])
        assert asked.said == [prompt[-1], *expected[f"{turn}.generated"].tolist()]
        assert asked.written == expected[f"{turn}.written"][0].tolist()
        assert_close(logits, expected[f"{turn}.logits"], f"logits of {turn}")
        memory = write(network, memory, [asked.written])
        assert_close(memory, expected[f"{turn}.stm_after"], f"memory after {turn}")


def test_the_same_at_once_for_three_sessions() -> None:
    """The reference's turns as rows of one batch, which end after 20, 7 and 20 tokens."""
    network, expected = reference_network(), vectors("generate")
    turns = ("turn0", "turn1", "turn2")
    prompts = [expected[f"{turn}.prompt"][0].tolist() for turn in turns]
    rows = [row(tuple(ids[:-1]), ids[-1], Sampling(max_tokens=20, suppress=False)) for ids in prompts]
    memory = torch.cat([expected[f"{turn}.stm_read"] for turn in turns], dim=1)
    logits = run(network, memory, rows)
    after = write(network, memory, [asked.written for asked in rows])
    for number, turn in enumerate(turns):
        assert rows[number].said[1:] == expected[f"{turn}.generated"].tolist()
        assert_close(logits[number], expected[f"{turn}.logits"], f"logits of {turn}")
        assert_close(after[:, number : number + 1], expected[f"{turn}.stm_after"], f"memory after {turn}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_cached_is_uncached_for_unequal_sessions(variant: str) -> None:
    """Every variant; sessions of several lengths, limits and modes, beside each other and alone."""
    network = network_of(*VARIANTS[variant])
    memory = initial_memory(network.config, 3, torch.Generator().manual_seed(1))
    limits, modes = (12, 3, 7), (ANSWER_ID, THINK_ID, None)

    def asked(number: int) -> Row:
        sampling = Sampling(temperature=1.0, top_k=40, max_tokens=limits[number])
        return row(PROMPTS[number], modes[number], sampling, seed=number)

    rows = [asked(number) for number in range(3)]
    logits = run(network, memory, rows)
    for number, together in enumerate(rows):
        own = memory[:, number : number + 1]
        alone = asked(number)
        (logits_alone,) = run(network, own, [alone])
        assert alone.said == together.said
        assert_close(logits[number], logits_alone, "beside others")
        at_once = uncached(network, own, together.written)[len(together.prompt) : -1]
        assert_close(logits[number], at_once, "uncached")
    written = write(network, memory, [of.written for of in rows])
    for number, of in enumerate(rows):
        alone = write(network, memory[:, number : number + 1], [of.written])
        assert_close(written[:, number : number + 1], alone, "memory")


def test_without_a_memory_every_layer_is_stateless() -> None:
    network, asked = network_of(), row(PROMPTS[0])
    logits: list[Tensor] = []
    for _ in answer(network, None, [asked], lambda _, of_token: logits.append(of_token.clone())):
        pass
    ids_1T = torch.tensor([asked.written])
    with torch.no_grad():
        hidden = network.decoder(network.embedding(ids_1T), torch.arange(ids_1T.shape[1])[None], None).hidden_BTD
        at_once = network.lm_head.logits(hidden)[0][len(asked.prompt) : -1]
    assert_close(torch.stack(logits), at_once, "without memory")


@pytest.mark.slow
def test_the_mode_is_chosen_once_by_the_larger_logit() -> None:
    network = network_of()
    memory = initial_memory(network.config, 1, torch.Generator().manual_seed(1))
    chosen = set()
    for first in range(40, 60):
        asked = row((2, 5, first), None)
        run(network, memory, [asked])
        logits = uncached(network, memory, [2, 5, first])[-1]
        wanted = THINK_ID if logits[THINK_ID] > logits[ANSWER_ID] else ANSWER_ID
        assert asked.said[0] == wanted
        chosen.add(wanted)
    assert chosen == {ANSWER_ID, THINK_ID}


@pytest.mark.slow
def test_control_tokens_that_an_answer_never_has_are_not_said() -> None:
    network = network_of()
    with torch.no_grad():
        network.lm_head.output.bias[:11] += 4.0
    hot, raw = (Sampling(temperature=2.0, max_tokens=20, suppress=suppress) for suppress in (True, False))
    drawn = [(mode, seed) for mode in (ANSWER_ID, THINK_ID) for seed in range(20)]
    bound, unbound = ([row((2, 5, 40), mode, kind, seed) for mode, seed in drawn] for kind in (hot, raw))
    run(network, initial_memory(network.config, 2 * len(drawn)), [*bound, *unbound])
    for asked in bound:
        answered = asked.said.index(ANSWER_ID) if ANSWER_ID in asked.said else len(asked.said)
        assert not {ANSWER_ID, THINK_ID} & set(asked.said[answered + 1 :])
    said, free = ({number for asked in rows for number in asked.said} for rows in (bound, unbound))
    assert said & set(range(11)) == {3, 6, 7, 8}
    assert free >= {0, 1, 2, 4, 5, 9, 10}


def test_words_of_a_vocabulary_without_later_control_tokens_are_said() -> None:
    """RxT-Alpha's has none of [T] [C] [U] [I]: those ids are words there."""
    network = network_of()
    with torch.no_grad():
        network.lm_head.output.bias[9] += 50.0
    asked = row((2, 5, 40))
    asked.controls = frozenset({0, 1, 2, 3, 4, 5, 6})
    run(network, initial_memory(network.config, 1), [asked])
    assert asked.said[1:] == [9] * 12


def test_an_answer_stops_where_the_row_is_full() -> None:
    network = network_of()
    with torch.no_grad():
        network.lm_head.output.bias[50] += 50.0
    asked = row((2, 5, *[40] * 40), sampling=Sampling())
    run(network, initial_memory(network.config, 1), [asked])
    assert len(asked.written) == network.config.seq_len == 64
    assert asked.written[-1] == 50, "the limit adds no [EOS]"


def test_no_token_depends_on_padding_or_what_stood_in_memory() -> None:
    """A long prompt beside a short one leaves keys behind that the short one's tokens overwrite."""
    network, long = network_of(), (2, 5, *range(20, 45))
    memory = initial_memory(network.config, 2, torch.Generator().manual_seed(2))
    short = row((2, 5, 40))
    logits = run(network, memory, [row(long), short])[1]
    at_once = uncached(network, memory[:, 1:], short.written)[3:-1]
    assert_close(logits, at_once, "short beside long")
