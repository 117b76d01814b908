"""Budgets are shared exactly."""

from __future__ import annotations

import pytest
import torch

from jeton.ops import budget


def long(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_largest_remainder_hand_case():
    # counts 5, 2, 1, 0 with 100 to share: 62.5, 25, 12.5, 0; the one left over goes to the lower of two equal fractions
    assert budget.allocate(long([5, 2, 1, 0]), 100, long([576] * 4)).tolist() == [[63, 25, 12, 0]]


def test_a_full_unit_hands_its_surplus_to_the_others_in_proportion():
    assert budget.allocate(long([8, 1, 1]), 50, long([10, 100, 100])).tolist() == [[10, 20, 20]]


def test_units_without_weight_take_what_nobody_else_can():
    assert budget.allocate(long([1, 0, 0]), 40, long([10, 30, 60])).tolist() == [[10, 10, 20]]
    assert budget.allocate(long([0, 0, 0]), 5, long([3, 3, 3])).tolist() == [[2, 2, 1]]


def test_more_than_all_is_all():
    assert budget.allocate(long([1, 2]), 99, long([3, 4])).tolist() == [[3, 4]]


def test_sharing_is_exact_and_within_caps_for_random_cases():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 20, (500, 6), generator=generator)
    caps = torch.randint(0, 30, (500, 6), generator=generator)
    total = torch.randint(0, 150, (500,), generator=generator)
    got = budget.allocate(weights, total, caps)
    assert torch.equal(got.sum(1), torch.minimum(total, caps.sum(1)))
    assert (got <= caps).all() and (got >= 0).all()
    single = torch.cat([budget.allocate(weights[i : i + 1], total[i : i + 1], caps[i : i + 1]) for i in range(50)])
    assert torch.equal(got[:50], single)


def test_a_split_follows_the_sizes():
    assert budget.split(10, long([50, 30, 20])).tolist() == [[5, 3, 2]]
    assert budget.split(10, long([7, 7, 7])).tolist() == [[4, 3, 3]]


def test_shares_per_image_and_per_crop():
    sizes = long([16, 16, 8])
    assert budget.shares(10, "image", sizes).tolist() == [[4, 4, 2]]
    assert budget.shares(10, "crop", sizes).tolist() == [[10, 10, 8]]
    assert budget.shares(0.5, "crop", sizes).tolist() == [[8, 8, 4]]


@pytest.mark.parametrize("keep", [1, 7, 0.3, 0.5, 1.0, 0.01])
def test_counts_of_tensors_equal_counts_of_numbers(keep):
    sizes = torch.arange(1, 200)
    assert budget.counts(keep, sizes).tolist() == [budget.count(keep, n) for n in range(1, 200)]
    assert budget.counts(keep, torch.tensor([0])).tolist() == [0]


@pytest.mark.parametrize("plan", [budget.evenly, budget.geometrically])
@pytest.mark.parametrize(("n", "keep", "depth"), [(196, 64, 12), (196, 1, 12), (16, 1, 4), (9, 9, 3), (577, 40, 24), (8, 1, 3)])
def test_a_plan_over_layers_ends_exactly_and_never_more_than_halves(plan, n, keep, depth):
    left = plan(n, keep, depth)
    assert len(left) == depth and left[-1] == keep
    for before, after in zip([n, *left], left, strict=False):
        assert (before + 1) // 2 <= after <= before


@pytest.mark.parametrize("plan", [budget.evenly, budget.geometrically])
def test_a_plan_beyond_halving_is_refused(plan):
    with pytest.raises(ValueError, match="2 layers can halve 16 tokens to 4 at the least"):
        plan(16, 3, 2)


def test_an_even_plan_takes_the_same_from_every_layer():
    assert budget.evenly(196, 100, 12) == [196 - 8 * (layer + 1) for layer in range(12)]


def test_a_geometric_plan_keeps_the_same_share():
    assert budget.geometrically(100, 25, 2) == [50, 25]
    assert budget.geometrically(1000, 1, 3, halving=False) == [100, 10, 1]
