"""Recycling: exact budgets, groups by hand, and what the anchors and pixels say."""

from __future__ import annotations

import pytest
import torch

from jeton.ops.attention import anchored, received, rows
from jeton.ops.grid import squares
from jeton.ops.pixels import entropy, grey
from jeton.ops.recycling import recycle
from jeton.place import Place


def whole(rows, k):
    return torch.full((rows, 1), k)


def test_a_group_becomes_its_weighted_mean_in_the_place_of_its_best_token():
    score, x = torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[[0.0], [7.0], [4.0]]])
    step = recycle(score, torch.tensor([[0, 1, 0]]), whole(1, 2), 2)
    assert step.index.tolist() == [[1, 2]] and step.mix(x)[0, :, 0].tolist() == pytest.approx([7.0, 3.0])
    twin = recycle(score, torch.tensor([[0, 1, 2]]), whole(1, 2), 2)  # each its own square: nothing to gather
    assert twin.mix(x)[0, :, 0].tolist() == pytest.approx([7.0, 4.0])


def naive(score, label, budget):
    """Gather from below, one token more at a time, until survivors and groups are as many as asked for."""
    n = len(score)
    order = sorted(range(n), key=lambda i: (score[i], -i))
    for gathered in range(n + 1):
        low = order[:gathered]
        groups = {}
        for i in low:
            groups.setdefault(int(label[i]), []).append(i)
        if n - gathered + len(groups) <= budget:
            break
    groups = sorted(groups.values(), key=lambda g: min((-score[i], i) for i in g))[: budget - (n - gathered)]
    out = {i: [i] for i in order[gathered:]}
    out.update({min(g, key=lambda i: (-score[i], i)): g for g in groups})
    return out


@pytest.mark.parametrize("budget", [1, 2, 5, 11, 29, 30])
@pytest.mark.parametrize("squares", [1, 4, 12])
def test_budgets_are_exact_and_groups_as_gathered_by_hand(budget, squares):
    generator = torch.Generator().manual_seed(budget)
    score = torch.rand(3, 30, generator=generator).mul(8).round().div(8)  # with ties
    label = torch.randint(squares, (3, 30), generator=generator)
    step = recycle(score, label, whole(3, budget), budget)
    assert step.k == budget and step.mask is None
    for b in range(3):
        expected = naive(score[b].tolist(), label[b], budget)
        assert step.index[b].tolist() == sorted(expected)
        for slot, at in enumerate(sorted(expected)):
            assert (step.assign[b] == slot).nonzero().flatten().tolist() == sorted(expected[at])
    x = torch.randn(3, 30, 4)
    torch.testing.assert_close(step.dense.sum(2), torch.ones(3, budget))
    torch.testing.assert_close(step.mix(x), step.dense @ x)


def test_rows_of_different_lengths_equal_themselves_alone():
    score, label = torch.rand(2, 20), torch.randint(6, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    step = recycle(score.masked_fill(~mask, 9e9), label, torch.tensor([[8], [5]]), 8, mask)
    for b, (n, k) in enumerate(((20, 8), (13, 5))):
        alone = recycle(score[b : b + 1, :n], label[b : b + 1, :n], whole(1, k), k)
        assert step.index[b][step.real[b]].tolist() == alone.index[0].tolist()
        assert step.assign[b, :n].tolist() == alone.assign[0].tolist()


def test_groups_without_weight_are_averaged_evenly():
    step = recycle(torch.tensor([[-0.5, -0.2, 1.0]]), torch.zeros(1, 3, dtype=torch.long), whole(1, 2), 2)
    assert step.dense[0].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_squares_need_not_be_whole():
    place = Place.grid(1, 5, 5)
    label = squares(place, 2.5, torch.zeros(1, 1, dtype=torch.bool))[0].view(5, 5)
    assert label.tolist() == [[0, 0, 0, 1, 1]] * 3 + [[2, 2, 2, 3, 3]] * 2


# -- anchors and pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", [3, 128])
def test_anchor_rows_are_those_of_the_whole_map(slab):
    q, k = torch.randn(2, 4, 17, 8) * 2, torch.randn(2, 2, 17, 8) * 2
    full = rows(q, k).mean(1)
    score = full.mean(1)
    for threshold in (0.0, 1.0, 1.5):
        for b in range(2):
            anchors = score[b] > threshold * score[b].mean()
            assert anchors.any() and (threshold == 0 or not anchors.all())
            got = anchored(q, k, threshold, slab=slab)[b]
            torch.testing.assert_close(got, full[b][anchors].mean(0))
    torch.testing.assert_close(anchored(q, k, 50.0, slab=slab), received(q, k, slab=slab))  # none: all rows


def test_padding_is_no_anchor():
    q, k = torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 4)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    got = anchored(q, k, 1.1, mask=mask)
    torch.testing.assert_close(got[1, :8], anchored(q[1:, :, :8], k[1:, :, :8], 1.1)[0])
    torch.testing.assert_close(got[0], anchored(q[:1], k[:1], 1.1)[0])


def test_entropy_counts_bits_of_pixels_as_they_were():
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    picture = torch.tensor([0, 0, 255, 255, 51, 102, 51, 102])
    colours = (picture / 255).expand(3, -1)
    normalised = (colours - 0.5) / 0.25
    assert (normalised < 0).any()
    assert torch.equal(grey(normalised[None], mean, std)[0], picture)
    assert entropy(picture[None])[0] == pytest.approx(2.0)
    assert entropy(torch.zeros(1, 16, dtype=torch.long))[0] == 0.0
    assert entropy(torch.arange(256)[None])[0] == pytest.approx(8.0)
    wrapped = (normalised[:1] * 255).to(torch.uint8).long()  # the twin: cast as they come
    assert entropy(wrapped)[0] != pytest.approx(2.0) or not torch.equal(wrapped[0], picture)
