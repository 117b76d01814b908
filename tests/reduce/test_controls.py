"""The controls do the plain thing they say."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.place import Place
from jeton.tokens import Tokens


def test_random_gives_a_row_the_same_subset_alone_and_in_any_batch():
    one = get("random", keep=7).reduce(Tokens(torch.randn(1, 40, 2))).index
    many = get("random", keep=7).reduce(Tokens(torch.randn(5, 40, 2))).index
    assert torch.equal(many, one.expand(5, -1))
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :20] = False
    padded = get("random", keep=7).reduce(Tokens(torch.randn(2, 60, 2), mask=mask))
    assert torch.equal(padded.index[1] - 20, one[0])


def test_random_leaves_the_global_state_alone_and_ignores_it():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = get("random", keep=7).reduce(Tokens(torch.zeros(1, 40, 2))).index
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(get("random", keep=7).reduce(Tokens(torch.zeros(1, 40, 2))).index, first)
    assert not torch.equal(get("random", keep=7, seed=1).reduce(Tokens(torch.zeros(1, 40, 2))).index, first)


def test_uniform_spaces_evenly():
    assert get("uniform", keep=4).reduce(Tokens(torch.zeros(1, 12, 1))).index.tolist() == [[1, 4, 7, 10]]
    mask = torch.tensor([[False, True, True, False, True, True]])
    kept = get("uniform", keep=2).reduce(Tokens(torch.zeros(1, 6, 1), mask=mask))
    assert kept.index[kept.real].tolist() == [2, 5]


def test_pool_averages_squares():
    x = torch.arange(16.0).reshape(1, 16, 1)
    after = get("pool", keep=4).reduce(Tokens(x, place=Place.grid(1, 4, 4))).apply(Tokens(x))
    expected = torch.nn.functional.avg_pool2d(x.reshape(1, 1, 4, 4), 2).flatten()
    torch.testing.assert_close(after.features.flatten(), expected)
    assert (after.size == 4).all()


@pytest.mark.parametrize("keep", [1, 5, 7, 13, 47, 48, 0.37])
def test_pool_is_exact_for_any_count_and_several_units(anyres, keep):
    place = anyres(1, 2, 4, 4)
    x = torch.randn(1, 48, 3)
    method = get("pool", keep=keep)
    step = method.reduce(Tokens(x, place=place))
    assert step.k == method.promise(48).count and (step.index.diff(dim=1) > 0).all()
    own = place.unit[0][step.index[0]][step.assign[0].clamp(min=0)]
    assert torch.equal(own[step.assign[0] >= 0], place.unit[0][step.assign[0] >= 0])
    torch.testing.assert_close(step.dense.sum(2), torch.ones(1, step.k))


def test_pool_is_exact_when_a_crop_has_lost_its_border(anyres):
    place = anyres(1, 2, 4, 4)
    mask = torch.ones(1, 48, dtype=torch.bool)
    mask[place.row.eq(3) & place.unit.gt(0)] = False
    for keep in (3, 10, 29, 40):
        step = get("pool", keep=keep).reduce(Tokens(torch.randn(1, 48, 2), mask=mask, place=place))
        assert step.count().tolist() == [keep]


def test_downsample_chooses_the_grid_and_resamples_the_picture():
    method = get("downsample", keep=60)
    assert method.grid(24, 24) == (7, 8)
    assert get("downsample", keep=0.25).grid(24, 24) == (12, 12)
    flat = torch.full((2, 3, 336, 336), 0.5)
    small = method.picture(flat, (7, 8), 14)
    assert small.shape == (2, 3, 98, 112)
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=1e-5, rtol=0)


def test_downsample_pools_tokens_to_the_same_grid():
    x = torch.randn(1, 144, 3)
    step = get("downsample", keep=40).reduce(Tokens(x, place=Place.grid(1, 12, 12)))
    assert step.count().tolist() == [36] and not get("downsample", keep=40).promise(144).exact
    got = step.apply(Tokens(x)).features[0, :36]
    expected = torch.nn.functional.avg_pool2d(x.mT.reshape(1, 3, 12, 12), 2).flatten(2).mT[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["pool", "downsample"])
def test_methods_of_the_grid_need_one(name):
    with pytest.raises(ValueError, match="no place"):
        get(name, keep=2).reduce(Tokens(torch.zeros(1, 9, 1)))
