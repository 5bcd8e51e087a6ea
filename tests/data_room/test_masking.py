from __future__ import annotations

import numpy as np
import pytest
import torch

from rxt_dist.data.masking import keyed_uniform, mask_for_mlm, sample_seed


def test_values_do_not_depend_on_how_samples_are_grouped() -> None:
    samples = torch.tensor([5, 0, 2**40 + 1, 7, 123_456_789])
    whole = keyed_uniform(1, "noise", samples, 40)
    for b, sample in enumerate(samples.tolist()):
        assert torch.equal(keyed_uniform(1, "noise", torch.tensor([sample]), 40)[0], whole[b])
    # A shorter draw is a prefix of a longer one.
    assert torch.equal(keyed_uniform(1, "noise", samples, 7), whole[:, :7])


def test_values_are_the_ones_of_an_independent_computation() -> None:
    """The hash once more in Python integers, so that a change of torch cannot change a run unnoticed."""
    import hashlib

    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = int.from_bytes(hashlib.shake_256(b"rxt-keyed-v1|42|mlm").digest(8), "little")
    sample_key = mix(mix((99 * gamma + key) & mask) + key & mask)
    wanted = [(mix((sample_key + (i + 1) * gamma) & mask) >> 40) / 2**24 for i in range(6)]
    assert keyed_uniform(42, "mlm", torch.tensor([99]), 6)[0].tolist() == wanted


def test_seeds_kinds_and_samples_are_independent() -> None:
    samples = torch.arange(200)
    base = keyed_uniform(0, "mlm", samples, 256)
    others = [
        keyed_uniform(1, "mlm", samples, 256),
        keyed_uniform(0, "memory", samples, 256),
        keyed_uniform(0, "mlm", samples + 1000, 256),
        base.roll(1, 0),
        base.roll(1, 1),
    ]
    for other in others:
        correlation = np.corrcoef(base.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(base.numel())


def test_values_are_uniform() -> None:
    values = keyed_uniform(7, "x", torch.arange(1000), 100).flatten()
    assert values.dtype == torch.float32
    assert 0 <= float(values.min()) < float(values.max()) < 1
    counts = torch.histc(values, 50, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 95  # 49 degrees of freedom; p = 0.0001


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
def test_masking_hits_the_wanted_share_and_no_special_id(probability: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (64, 512), generator=generator)
    masked, labels = mask_for_mlm(tokens, torch.arange(64), 3, probability)
    chosen = labels != -100
    special = tokens < 11
    assert not bool((chosen & special).any())
    assert torch.equal(labels[chosen], tokens[chosen])
    assert bool((masked[chosen] == 4).all())
    assert torch.equal(masked[~chosen], tokens[~chosen])
    share = float(chosen.sum() / (~special).sum())
    assert abs(share - probability) < 0.01


def test_another_pass_over_a_row_masks_other_tokens() -> None:
    tokens = torch.full((1, 512), 30)
    first, _ = mask_for_mlm(tokens, torch.tensor([10]), 0, 0.5)
    second, _ = mask_for_mlm(tokens, torch.tensor([100_010]), 0, 0.5)
    assert not torch.equal(first, second)


def test_sample_seeds_fit_a_generator_and_differ() -> None:
    keys = [(0, "joint", "noise", 1), (1, "joint", "noise", 1), (0, "sft", "noise", 1), (0, "joint", "keep", 1)]
    keys.append((0, "joint", "noise", 2))
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [sample_seed(*key) for key in keys]
    torch.Generator().manual_seed(seeds[0])
