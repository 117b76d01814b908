"""Selections are exact, ascending and deterministic, and padding never wins."""

from __future__ import annotations

import itertools

import pytest
import torch

from jeton.ops import selection
from jeton.place import Place


def test_the_best_stay_in_their_order():
    assert selection.top_k(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2).index.tolist() == [[1, 3]]


def test_ties_go_to_the_lowest_index_at_every_size():
    for n in (5, 40, 700):  # sorts change algorithm with size
        assert selection.top_k(torch.zeros(1, n), 3).index.tolist() == [[0, 1, 2]]


def test_padding_never_wins_even_against_minus_infinity():
    score = torch.tensor([[torch.nan, -torch.inf, 5.0, -torch.inf]])
    mask = torch.tensor([[False, True, False, True]])
    kept = selection.top_k(score, 2, mask)
    assert kept.index[kept.real].tolist() == [1, 3]


def test_a_padded_row_keeps_what_it_keeps_alone():
    score = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, :8] = False
    mask[2, 3:] = False
    for keep in (5, 0.25, 20, 1.0):
        batch = selection.top_k(score, keep, mask)
        for row, offset in ((0, 0), (1, 8), (2, 0)):
            alone = selection.top_k(score[row : row + 1, mask[row]], keep)
            got = batch.index[row][batch.real[row]]
            assert torch.equal(got, alone.index[0] + offset), (keep, row)


def test_keeping_everything_is_the_identity():
    assert selection.top_k(torch.rand(2, 6), 1.0).is_identity
    assert selection.top_k(torch.rand(2, 6), 99).is_identity


def test_the_prefix_always_stays_and_counts_for_nothing():
    kept = selection.top_k(torch.tensor([[-9.0, -9.0, 1.0, 2.0, 3.0]]), 1, prefix=2)
    assert kept.index.tolist() == [[0, 1, 4]] and kept.prefix == 2


def units(*sizes: int) -> Place:
    unit = torch.tensor([[u for u, size in enumerate(sizes) for _ in range(size)]])
    return Place(unit, unit, unit, unit, unit, units=len(sizes))


def test_every_unit_gets_its_share_and_keeps_its_own_best():
    score = torch.tensor([[9.0, 8, 7, 6, 1, 4, 3, 2]])
    kept = selection.top_k(score, 4, place=units(4, 4))
    assert kept.index.tolist() == [[0, 1, 5, 6]] and kept.mask is None
    flat = selection.top_k(score, 4)  # the twin: without units the first four win
    assert flat.index.tolist() == [[0, 1, 2, 3]]


def test_a_budget_per_crop_is_given_to_each():
    kept = selection.top_k(torch.rand(1, 9), 3, place=units(4, 4, 1), per="crop")
    counts = torch.bincount(units(4, 4, 1).unit[0][kept.index[kept.real]])
    assert counts.tolist() == [3, 3, 1]


def test_ranks_in_units_count_from_the_best_of_each():
    unit = torch.tensor([[0, 1, 0, 1, 0]])
    score = torch.tensor([[1.0, 5.0, 3.0, 5.0, 2.0]])
    assert selection.rank_in_units(score, unit, 2).tolist() == [[2, 0, 0, 1, 1]]


def test_even_spacing_is_exact_and_even():
    for n in range(1, 40):
        for k in range(1, n + 1):
            index = selection.evenly_spaced(n, k, 1, torch.device("cpu")).index[0]
            assert len(index) == k and index.unique().numel() == k
            gaps = index.diff()
            assert k < 2 or gaps.max() - gaps.min() <= 1


def test_noise_depends_on_seed_and_position_only():
    torch.manual_seed(0)
    one = selection.noise(100, 3)
    torch.manual_seed(1)
    assert torch.equal(one[:50], selection.noise(50, 3))
    assert not torch.equal(one, selection.noise(100, 4))
    assert one.min() >= 0 and one.max() < 2**53 and one.unique().numel() == 100


def test_noise_is_uniform():
    draws = torch.stack([selection.noise(64, seed) for seed in range(2000)]).double() / 2**53
    assert (draws.mean(0) - 0.5).abs().max() < 0.03  # every position, over seeds
    kept = (draws.argsort(1)[:, :16][..., None] == torch.arange(64)).any(1).double().mean(0)
    assert (kept - 0.25).abs().max() < 0.05  # every token is kept equally often


HAND = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])


def test_max_min_diversity_hand_case():
    _, nearest = selection._distances(selection.normalise(HAND), None)
    torch.testing.assert_close(nearest, torch.tensor([[0.2, 0.2, 0.4, 1.0]]))
    assert selection._greedy_picks(selection.normalise(HAND), 3, None).tolist() == [[3, 0, 2]]
    assert selection.max_min_diverse(HAND, 3).index.tolist() == [[0, 2, 3]]


def test_max_min_diversity_is_at_least_half_of_the_best_possible():
    for seed in range(20):
        x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(seed))
        unit = selection.normalise(x)[0]
        distance = (1 - unit @ unit.T).clamp(min=0).sqrt()  # a metric

        def least(chosen, distance=distance):
            return min(distance[i, j].item() for i, j in itertools.combinations(chosen, 2))

        best = max(least(chosen) for chosen in itertools.combinations(range(9), 4))
        assert least(selection.max_min_diverse(x, 4).index[0].tolist()) >= best / 2 - 1e-6


def test_duplicates_are_never_chosen_twice():
    x = torch.ones(1, 10, 4)
    x[0, 6] = torch.tensor([1.0, -1, 1, -1])
    index = selection.max_min_diverse(x, 3).index[0]
    assert index.unique().numel() == 3 and 6 in index
    assert selection.max_min_diverse(torch.ones(1, 6, 3), 5).index.tolist() == [[0, 1, 2, 3, 4]]


def test_diversity_in_slabs_equals_diversity_from_a_table(monkeypatch):
    x = torch.randn(2, 1100, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1100, dtype=torch.bool)
    mask[1, 900:] = False
    table = selection.max_min_diverse(x, 50), selection.max_min_diverse(x, 50, mask)
    monkeypatch.setattr(selection, "_STORED", 100)
    slabs = selection.max_min_diverse(x, 50), selection.max_min_diverse(x, 50, mask)
    assert all(torch.equal(a.index, b.index) for a, b in zip(table, slabs, strict=True))


@pytest.mark.parametrize("keep", [1, 6, 0.3])
def test_diversity_of_a_padded_row_equals_that_row_alone(keep):
    x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(1))
    x[1, 11:] = 100 * torch.randn(5, 5)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 11:] = False
    kept = selection.max_min_diverse(x, keep, mask)
    alone = selection.max_min_diverse(x[1:, :11], keep)
    assert torch.equal(kept.index[1][kept.real[1]], alone.index[0])


# -- facility location ----------------------------------------------------------------------------------------------------


def covered(x, chosen):
    unit = torch.nn.functional.normalize(x, dim=-1)
    return float((unit @ unit[chosen].T).amax(1).mean())


def test_facility_location_takes_one_of_each_kind():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    kept = selection.facility_location(x, 2, torch.zeros(1, 3)).index[0].tolist()
    assert kept == [0, 2] and covered(x[0], kept) == 1.0 and covered(x[0], [0, 1]) < 0.7


def test_facility_location_without_cover_takes_the_most_valuable():
    generator = torch.Generator().manual_seed(0)
    x, value = torch.randn(2, 30, 4, generator=generator), torch.rand(2, 30, generator=generator)
    assert torch.equal(selection.facility_location(x, 7, value, 0.0).index, selection.top_k(value, 7).index)


@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_facility_location_is_greedy_in_every_step(balance):
    generator = torch.Generator().manual_seed(1)
    x, value = torch.randn(1, 14, 3, generator=generator), torch.rand(1, 14, generator=generator)
    chosen = []
    for _ in range(5):
        worth = {
            j: balance * covered(x[0], [*chosen, j]) + (1 - balance) * float(value[0, [*chosen, j]].mean())
            for j in range(14)
            if j not in chosen
        }
        chosen.append(max(worth, key=lambda j: worth[j]))
        assert selection.facility_location(x, len(chosen), value, balance).index[0].tolist() == sorted(chosen)
