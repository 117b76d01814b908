"""The elbow of falling scores."""

from __future__ import annotations

import pytest
import torch

from jeton.ops.elbow import elbow, elbow_count, elbow_keep

CARD = torch.tensor([[10.0, 9, 8, 2, 1, 1, 0, 0]])


def test_the_elbow_is_the_rank_farthest_from_the_chord():
    rank, value = elbow(CARD)
    assert rank.tolist() == [[3]] and value.tolist() == [[2]]
    distance = [abs(-10 * i - 7 * (y - 10)) / (10**2 + 7**2) ** 0.5 for i, y in enumerate(CARD[0].tolist())]
    assert max(distance) == distance[3] == pytest.approx(2.13, abs=5e-3)
    assert elbow_count(CARD).tolist() == [[3]] and elbow_keep(CARD)[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_order_does_not_matter_and_only_strictly_larger_scores_stay():
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    assert torch.equal(elbow_keep(CARD[:, order])[0], CARD[0, order] > 2)


@pytest.mark.parametrize(
    "score", [torch.full((1, 6), 3.0), torch.zeros(1, 6), torch.ones(1, 1), torch.tensor([[4.0, 3, 2, 1]]) * 0]
)
def test_equal_scores_keep_everything(score):
    assert elbow_count(score).tolist() == [[score.shape[1]]]


def test_a_straight_line_has_its_elbow_at_the_first_rank_and_keeps_everything():
    assert elbow(torch.arange(9.0, 0, -1)[None])[0].tolist() == [[0]]
    assert elbow_count(torch.arange(9.0, 0, -1)[None]).tolist() == [[9]]


def test_padding_takes_no_part():
    padded = torch.cat([CARD, torch.full((1, 3), 99.0)], 1)
    mask = torch.arange(11)[None] < 8
    assert elbow_keep(padded, mask)[0].nonzero().flatten().tolist() == [0, 1, 2]
    both = torch.cat([padded, padded]), torch.cat([mask, torch.arange(11)[None] < 2])
    assert elbow_count(*both).tolist() == [[3], [2]]
