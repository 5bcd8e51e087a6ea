"""What routers are told: the balance loss, the z-loss, the counts."""

from __future__ import annotations

import pytest
import torch
from tiny import make_stage, model_config, packed_batch, relative, run_config
from torch import Tensor

from rxt_dist.losses import load_fractions
from rxt_dist.model.moe import MoEFeedForward, RouterGate, RoutingTerms, routing_terms, select_experts

EXPERTS, ACTIVE = 8, 2


def logits_of(tokens: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def terms_of(logits: Tensor, valid: Tensor, load: Tensor, bias: Tensor | None = None) -> RoutingTerms:
    return routing_terms(select_experts(logits, ACTIVE, bias), valid, load)


def test_terms_equal_formulas_written_by_hand() -> None:
    logits = logits_of(50)
    valid = torch.arange(50) % 3 != 0
    load = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(1)).softmax(0)
    bias = torch.linspace(-0.1, 0.1, EXPERTS)
    terms = terms_of(logits, valid, load, bias)
    balance, z, counts = 0.0, 0.0, [0] * EXPERTS
    for row in logits[valid].double().tolist():
        exponentials = torch.tensor(row).double().exp()
        probabilities = exponentials / exponentials.sum()
        balance += EXPERTS * float((load.double() * probabilities).sum())
        z += float(exponentials.sum().log()) ** 2
        for expert in (probabilities + bias).argsort(descending=True)[:ACTIVE].tolist():
            counts[expert] += 1
    assert terms.balance_M.item() == pytest.approx(balance, rel=1e-5)
    assert terms.z_M.item() == pytest.approx(z, rel=1e-5)
    assert terms.counts_ME.tolist() == counts


def test_the_losses_are_those_of_megatron() -> None:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    logits, valid = logits_of(70, spread=3.0), torch.arange(70) % 4 != 1
    load = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(2)).softmax(0)
    terms = terms_of(logits, valid, load)
    theirs = switch_load_balancing_loss_func(
        logits.softmax(-1), load, total_num_tokens=1, topk=1, num_experts=EXPERTS, moe_aux_loss_coeff=1.0,
        padding_mask=valid,
    )  # fmt: skip
    torch.testing.assert_close(terms.balance_M, theirs)
    torch.testing.assert_close(terms.z_M / valid.sum(), z_loss_func(logits, 1.0, padding_mask=~valid))


def test_padding_is_neither_counted_nor_in_the_loss() -> None:
    logits = logits_of(40)
    valid = torch.arange(40) < 25
    load = torch.full((EXPERTS,), 1 / EXPERTS)
    alone = terms_of(logits[:25], valid[:25], load)
    logits.requires_grad_()
    padded = terms_of(logits, valid, load)
    for mine, theirs in zip(padded, alone, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert padded.counts_ME.sum().item() == 25 * ACTIVE
    (padded.balance_M + padded.z_M).backward()
    assert logits.grad is not None
    assert not logits.grad[25:].any()
    assert bool(logits.grad[:25].any())


def test_a_micro_batch_of_nothing_but_padding_is_zero() -> None:
    logits = logits_of(6).requires_grad_()
    terms = terms_of(logits, torch.zeros(6, dtype=torch.bool), torch.full((EXPERTS,), 0.125))
    (terms.balance_M + terms.z_M).backward()
    assert (terms.balance_M.item(), terms.z_M.item(), terms.counts_ME.sum().item()) == (0.0, 0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_even_experts_cost_one_a_token() -> None:
    valid = torch.ones(30, dtype=torch.bool)
    even = torch.full((EXPERTS,), 1 / EXPERTS)
    assert terms_of(logits_of(30), valid, even).balance_M.item() / 30 == pytest.approx(1.0)
    skewed = torch.tensor([1.0] + [0.0] * 7)
    on_it = torch.zeros(30, EXPERTS)
    on_it[:, 0] = 50.0
    assert terms_of(on_it, valid, skewed).balance_M.item() / 30 == pytest.approx(EXPERTS)


def test_terms_of_parts_add_up_to_those_of_the_whole() -> None:
    logits, valid = logits_of(64), torch.arange(64) % 5 != 0
    load = torch.rand(EXPERTS).softmax(0)
    whole = terms_of(logits, valid, load)
    cuts = ([16] * 4, [1, 63], [30, 34])
    for sizes in cuts:
        parts = [terms_of(part, mask, load) for part, mask in zip(logits.split(sizes), valid.split(sizes), strict=True)]
        for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.stack(pieces).sum(0), total)


def test_loads_carry_no_gradient_and_raise_the_cost_of_busy_experts() -> None:
    logits = logits_of(20).requires_grad_()
    valid = torch.ones(20, dtype=torch.bool)
    load = torch.tensor([0.65] + [0.05] * 7)
    terms_of(logits, valid, load).balance_M.backward()
    assert not load.requires_grad
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())


def loads_over_mean(steps: int) -> list[float]:
    """Largest load over the mean while a skewed router trains on the balance loss alone.

    As in the engine, the loads of a step are those of the batch before.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 16, generator=generator)
    # A direction that all tokens share lets the router prefer experts whatever the token is.
    x[:, 0] = 1.0
    gate = torch.nn.Linear(16, EXPERTS, bias=False)
    with torch.no_grad():
        gate.weight.copy_(0.3 * torch.randn(EXPERTS, 16, generator=generator))
        gate.weight[:, 0] = torch.linspace(2.0, -2.0, EXPERTS)
    optimizer = torch.optim.Adam(gate.parameters(), lr=2e-2)
    valid = torch.ones(1024, dtype=torch.bool)
    load = load_fractions(torch.zeros(1, EXPERTS, dtype=torch.int64))[0]
    found = []
    for _ in range(steps):
        terms = terms_of(gate(x), valid, load)
        (terms.balance_M / 1024).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = load_fractions(terms.counts_ME.unsqueeze(0))[0]
        found.append(load.max().item() * EXPERTS)
    return found


def test_a_skewed_router_balances_itself_by_the_loss_alone() -> None:
    loads = loads_over_mean(300)
    assert loads[0] > 2.5
    assert max(loads[-20:]) < 1.1


def test_the_z_loss_pulls_large_logits_down() -> None:
    logits = (logits_of(20) + 5.0).requires_grad_()
    terms_of(logits, torch.ones(20, dtype=torch.bool), torch.ones(EXPERTS)).z_M.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1))


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_counted_twice_under_recomputation(recompute: bool) -> None:
    stage = make_stage(run_config(recompute=recompute))
    batch = packed_batch()
    output = stage(stage.prepare(batch, 0), torch.full((3, EXPERTS), 1 / EXPERTS))
    valid = int((batch.unpack().segments_BT >= 0).sum())
    before = output.expert_counts_ME.clone()
    output.sums_J.sum().backward()
    assert torch.equal(output.expert_counts_ME, before)
    assert before.sum(-1).tolist() == [valid * ACTIVE] * 3
    # With uniform loads the balance term is 1 a token, whatever the router says.
    assert output.sums_J[2].item() == pytest.approx(valid, rel=1e-5)


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        stage = make_stage(run_config(recompute=recompute))
        stage(stage.prepare(packed_batch(), 0), torch.full((3, EXPERTS), 1 / EXPERTS)).sums_J.sum().backward()
        gradients.append([p.grad for p in stage.parameters() if p.requires_grad])
    assert all(relative(mine, theirs) < 1e-6 for mine, theirs in zip(*gradients, strict=True))


def test_a_bias_changes_the_choice_but_not_the_shares() -> None:
    """Shares are the chosen experts' own probabilities, made to sum to 1."""
    layer = MoEFeedForward(model_config("decoder.moe.shared_experts=0", "decoder.moe.shared_hidden=0"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    layer.routed.set_choice_bias(torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 5.0]))
    out, routing = layer.routed(x)
    probs = routing.probs_NE
    assert set(routing.selected_NK.flatten().tolist()) == {0, 7}
    share = probs[:, [0, 7]] / probs[:, [0, 7]].sum(-1, keepdim=True)
    flat, wanted = x.flatten(0, 1), torch.zeros(10, 32)
    for column, expert in enumerate((0, 7)):
        gate, up = (flat @ layer.routed.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        wanted += share[:, column : column + 1] * (
            (torch.nn.functional.silu(gate) * up) @ layer.routed.experts.down_proj[expert].T
        )
    torch.testing.assert_close(out.flatten(0, 1), wanted, rtol=1e-4, atol=1e-6)


def test_a_bfloat16_router_chooses_what_float64_would() -> None:
    """Logits rounded to bfloat16 would send one token in twenty elsewhere, and leave one in ten with a tie."""
    generator = torch.Generator().manual_seed(0)
    gate = RouterGate(512, 384, bias=False)
    torch.nn.init.normal_(gate.weight, std=0.02, generator=generator)
    gate.to(torch.bfloat16)
    x = torch.randn(500, 512, generator=generator).to(torch.bfloat16)
    logits = gate(x)
    assert logits.dtype == torch.float32
    exact = x.double() @ gate.weight.double().T
    wanted = exact.topk(10).indices.sort(-1).values
    assert torch.equal(select_experts(logits, 10, None).selected_NK.sort(-1).values, wanted)
    rounded = select_experts(logits.to(torch.bfloat16), 10, None).selected_NK.sort(-1).values
    assert (rounded != wanted).any(-1).float().mean().item() > 0.02


def test_the_gradients_of_a_bfloat16_router_are_those_of_float32_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = RouterGate(32, EXPERTS, bias=False)
    torch.nn.init.normal_(gate.weight, generator=generator)
    gate.to(torch.bfloat16)
    x = torch.randn(64, 32, generator=generator).to(torch.bfloat16).requires_grad_()
    direction = torch.randn(64, EXPERTS, generator=generator)
    mine = torch.autograd.grad(gate(x), (x, gate.weight), direction)
    for gradient, wanted in zip(mine, (direction @ gate.weight.float(), direction.T @ x.float()), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, wanted.to(torch.bfloat16), rtol=2**-8, atol=1e-6)


def test_counts_are_those_of_the_choice_that_dispatched_the_tokens() -> None:
    """With ties at the K-th place a second choice could differ; a choice made by hand is counted as it is."""
    logits = torch.zeros(4, EXPERTS)
    made = select_experts(logits, ACTIVE, None)._replace(selected_NK=torch.tensor([[6, 7], [7, 1], [6, 1], [7, 6]]))
    terms = routing_terms(made, torch.tensor([True, True, True, False]), torch.full((EXPERTS,), 0.125))
    assert terms.counts_ME.tolist() == [0, 2, 0, 0, 0, 0, 2, 2]
