"""What stands around a step: one reduction before it, one after it, and one wait for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_stage, packed_batch, run_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rxt_dist.engine.routing import RoutingState
from rxt_dist.engine.sums import StepSums
from rxt_dist.losses import StageOutput, objective

CPU = torch.device("cpu")


class Ranks:
    """Two equal ranks on a device, each of whose reductions is counted."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.reductions = device, 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.reductions += 1
        return values.to(self.device) * 2


def output_on(device: torch.device) -> StageOutput:
    counts = torch.ones(3, 8, dtype=torch.int64, device=device)
    return StageOutput(torch.ones(4, device=device), torch.ones(4, dtype=torch.int64, device=device), counts)


def test_nothing_but_reading_waits_for_the_device() -> None:
    """On tensors without contents whoever asks for a number raises."""
    stage = make_stage(run_config())
    micros = [stage.prepare(part, 0) for part in packed_batch().micro_batches(4)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ranks: Any = Ranks(CPU)
        routing: Any = SimpleNamespace(counts_ME=torch.zeros(3, 8, dtype=torch.int64, device=CPU))
        sums = StepSums(stage, micros, ranks, routing)
        for _ in micros:
            output = output_on(CPU)
            objective(output.sums_J, sums.counts_J, sums.weights_J)
            sums.add(output)
        sums.reduce()
        state = RoutingState(3, 8, CPU, 0.01)
        state.update(sums.expert_counts_ME)
        assert ranks.reductions == 2
        with pytest.raises(DataDependentOutputException):
            sums.read()


def test_what_is_read_is_the_sum_over_micro_batches_and_ranks() -> None:
    stage = make_stage(run_config())
    micros = [stage.prepare(part, 0) for part in packed_batch().micro_batches(4)]
    ranks: Any = Ranks(CPU)
    sums = StepSums(stage, micros, ranks, RoutingState(3, 8, CPU, None))
    for _ in micros:
        sums.add(output_on(CPU))
    sums.reduce()
    totals, chosen_ME, (norm, other) = sums.read(torch.tensor(1.5), torch.tensor(float("inf")))
    assert (norm, other) == (1.5, float("inf"))
    assert totals.sums_J.tolist() == [4.0] * 4
    assert totals.hits_J.tolist() == [4] * 4
    assert chosen_ME.tolist() == [[4] * 8] * 3
    assert (totals.tokens, totals.pairs) == (2 * packed_batch().real_tokens, 2 * packed_batch().pairs)
    assert totals.counts_J.tolist() == (2 * sum(stage.counts(micro) for micro in micros)).tolist()
