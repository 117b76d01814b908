"""Counts by entropy, and rotary states at several places, in numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from jeton.ops.budget import linearly
from jeton.ops.entropy import entropy_count
from jeton.ops.rotation import between, bias, expanded_scores, trigonometric_scores


def count(share: list[float], target: int, remaining: int, real: int | None = None) -> int:
    size = torch.tensor([[real or len(share)]])
    return int(entropy_count(torch.tensor([share]), size, torch.tensor([[target]]), remaining))


def test_counts_of_the_card():
    share = [0.7, 0.1, 0.1, 0.1]
    entropy = -sum(p * math.log(p) for p in share) / math.log(4)
    assert entropy == pytest.approx(0.67839, abs=1e-5) and 2 * (1 - entropy**2) == pytest.approx(1.0796, abs=1e-4)
    assert count(share, 2, 1) == 1
    assert count([0.25] * 4, 2, 1) == 0
    assert count([0.5, *[0.5 / 575] * 575], 64, 4) == 161


def test_zeros_padding_and_a_single_token_are_no_trouble():
    assert count([1.0, 0.0, 0.0, 0.0], 1, 1) == 3  # no spread at all: everything may go
    assert count([0.7, 0.1, 0.1, 0.1, 0, 0, 0], 2, 1, real=4) == 1
    assert count([1.0], 1, 1) == 0 and count([0.7, 0.1, 0.1, 0.1], 4, 1) == 0


def test_the_trigonometric_form_equals_expanding_and_rotating():
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(40, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(8) / 8)
    for _ in range(5):
        q, k = (torch.randn(2, 3, 9, 16, dtype=torch.float64, generator=generator) for _ in range(2))
        owner = torch.randint(0, 9, (40,), generator=generator)
        direct, cheap = expanded_scores(q, k, owner, angle), trigonometric_scores(q, k, owner, angle)
        assert (direct - cheap).abs().max() < 1e-12
        # the twin: every place rotated as its first one is
        first = angle[(owner[None] == owner[:, None]).int().argmax(1)]
        assert (direct - trigonometric_scores(q, k, owner, first)).abs().max() > 1


def test_a_rotation_is_carried_on_from_where_it_stands():
    angle = torch.tensor([[0.3, 0.02], [2.5, 1.1]], dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    for scale in (1.0, 1.3):
        turned = between(scale * cos[1], scale * sin[1], scale * cos[0], scale * sin[0])
        torch.testing.assert_close(turned[0], (angle[1] - angle[0]).cos())
        torch.testing.assert_close(turned[1], (angle[1] - angle[0]).sin())
    same = between(cos[0], sin[0], cos[0], sin[0])
    assert torch.equal(same[0], torch.ones(2, dtype=torch.float64)) and not same[1].any()


def test_linear_plans_fall_or_grow_and_end_exactly():
    # 96 to go in 4 blocks: r = 48, then 48, 36 and the 12 that are left
    assert linearly(200, 104, 4) == [152, 116, 104, 104]
    assert linearly(200, 104, 4, rising=True) == [200, 188, 152, 104]
    for keep in (5, 64, 199, 200):
        for rising in (False, True):
            plan = linearly(200, keep, 12, rising)
            assert plan[-1] == keep and all(a >= b >= a - a // 2 for a, b in zip([200, *plan], plan, strict=False))


def test_what_positions_alone_give_a_product_is_the_mean_cosine_of_their_distance():
    angle = torch.tensor([0.0, 1.0, 4.0])[:, None] * torch.tensor([1.0, 0.1])
    ones = torch.cat([angle.cos() - angle.sin(), angle.cos() + angle.sin()], 1)
    # by hand: (cos 1 + cos .1) / 2, (cos 3 + cos .3) / 2 below the floor, (cos 4 + cos .4) / 2
    found = bias(ones, ones)
    expected = torch.tensor([[1, 0.767653, 0.133709], [0.767653, 1, 0.01], [0.133709, 0.01, 1]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert bias(ones, ones, floor=-1)[1, 2] == pytest.approx(-0.017328, abs=1e-6)
    torch.testing.assert_close(bias(ones[1:2], ones), expected[1:2], atol=1e-6, rtol=0)
