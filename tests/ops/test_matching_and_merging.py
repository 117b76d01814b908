"""Who merges with whom, and what comes of it."""

from __future__ import annotations

import torch

from jeton.ops import matching
from jeton.ops.merging import add_mean_weight, merge
from jeton.ops.similarity import cosine, normalise
from jeton.tokens import Tokens


def test_parity_matching_lists_the_best_edges_first():
    x = torch.tensor([[[9.0, 9.0], [1, 0], [0.6, 0.8], [0, 1], [0.96, 0.28]]])
    pairs = matching.by_parity(x, prefix=1)
    assert pairs.sender[0].tolist() == [4, 2, 0] and pairs.receiver[0, :2].tolist() == [1, 3]


def test_equal_edges_go_to_the_lowest_sender_and_receiver():
    pairs = matching.by_parity(torch.ones(1, 8, 2))
    assert pairs.sender.tolist() == [[0, 2, 4, 6]] and pairs.receiver.tolist() == [[1, 1, 1, 1]]


def test_the_prefix_neither_sends_nor_receives():
    for prefix in (1, 2, 3, 5):
        n = prefix + 9
        tokens = Tokens(torch.ones(1, n, 2), prefix=prefix)
        step = matching.merge_pairs(tokens, matching.by_parity(tokens.features, prefix), goal=5)
        assert step.index[0, :prefix].tolist() == list(range(prefix))
        assert step.size[0, :prefix].tolist() == [1.0] * prefix and step.k == prefix + 5
        assert step.order[0, :prefix].tolist() == list(range(prefix))


def test_a_zero_key_gives_no_nan():
    assert torch.equal(normalise(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))
    x = torch.randn(1, 8, 4)
    x[0, 2] = 0
    assert cosine(x, x).isfinite().all() and matching.energy(x, 0.5).isfinite().all()


def test_energy_hand_case():
    x = torch.tensor([[[1.0, 0], [0.8, 0.6], [0.6, 0.8], [-1, 0]]])
    torch.testing.assert_close(matching.energy(x, 0.5), torch.tensor([[0.0308, 0.1331, 0.0982, -0.4179]]), atol=5e-5, rtol=0)


def test_energy_of_a_padded_row_equals_that_row_alone():
    x = torch.randn(2, 9, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    padded = matching.energy(x, 0.5, mask=mask)
    torch.testing.assert_close(padded[1:, :6], matching.energy(x[1:, :6], 0.5))
    assert (padded[1, 6:] == -torch.inf).all()


def test_merging_takes_the_mean_weighted_by_size():
    x = torch.tensor([[[1.0], [4.0], [10.0]]])
    plain = merge(torch.tensor([[0, 0, 2]]), 2).apply(Tokens(x))
    assert plain.features.flatten().tolist() == [2.5, 10.0] and plain.size.tolist() == [[2, 1]]
    weighted = merge(torch.tensor([[0, 0, 2]]), 2, size=torch.tensor([[2.0, 1.0, 5.0]]))
    assert weighted.apply(Tokens(x)).features.flatten().tolist() == [2.0, 10.0]


def test_merging_conserves_the_weighted_sum_over_rounds():
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    tokens = Tokens(x)
    for _ in range(3):
        pairs = matching.by_parity(tokens.features, order=tokens.order)
        tokens = matching.merge_pairs(tokens, pairs, len(tokens) - 8).apply(tokens)
    torch.testing.assert_close((tokens.size[..., None] * tokens.features).sum(1), x.sum(1), atol=1e-5, rtol=0)
    assert (tokens.size.sum(1) == 40).all()
    mean = tokens.features.sum(1)  # the twin: without sizes the sum is lost
    assert (mean - x.sum(1)).abs().max() > 0.1


def test_adding_the_mean_to_an_anchor():
    into = torch.tensor([[0, 0, 0, 3, -1]])
    assert add_mean_weight(into)[0, :4].tolist() == [1.0, 0.5, 0.5, 1.0]


def test_halvings_reach_the_goal_in_as_few_rounds_as_possible():
    assert matching.halvings(16, 1) == [8, 4, 2, 1]
    assert matching.halvings(10, 7) == [7]
    assert matching.halvings(9, 9) == [9]
