"""Smaller grids as reductions, against torch's own resampling and against merging written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from jeton.ops import resize
from jeton.place import Place
from jeton.tokens import Tokens

SIZES = [(1, 1), (2, 1), (1, 3), (3, 4), (4, 3), (5, 6), (5, 7)]


def clip(frames=3, height=5, width=7, d=6, batch=2, seed=0):
    x = torch.randn(batch, frames * height * width, d, generator=torch.Generator().manual_seed(seed))
    return Tokens(x, place=Place.clip(batch, frames, height, width))


def grids(sizes):
    """(B, U) rows and columns from a list of (rows, columns) per row of the batch."""
    return tuple(torch.tensor([[size[axis] for size in row] for row in sizes]) for axis in (0, 1))


def pictures(tokens, frames=3, height=5, width=7):
    return tokens.features.view(len(tokens.features), frames, height, width, -1)


@pytest.mark.parametrize("how", ["bilinear", "adaptive"])
def test_a_grid_is_resampled_as_torch_does_it(how):
    sizes = [[(3, 4), (5, 7), (2, 1)], [(1, 1), (0, 0), (4, 3)]]
    tokens, (rows, cols) = clip(), grids(sizes)
    k = int((rows * cols).sum(1).max())
    step = getattr(resize, how)(tokens.place, rows, cols, k)
    after = step.apply(tokens)
    for row in range(2):
        wanted = []
        for frame, size in enumerate(sizes[row]):
            if size[0] == 0:
                continue
            x = pictures(tokens)[row, frame].permute(2, 0, 1)[None]
            x = F.interpolate(x, size, mode="bilinear") if how == "bilinear" else F.adaptive_avg_pool2d(x, size)
            wanted.append(x[0].flatten(1).T)
        real = step.real[row]
        torch.testing.assert_close(after.features[row][real], torch.cat(wanted))
        assert (after.index[row][real].diff() > 0).all()
    torch.testing.assert_close(after.features[step.real], (step.dense @ tokens.features)[step.real])
    torch.testing.assert_close(step.dense.sum(2)[step.real], torch.ones(int(step.real.sum())))
    assert torch.equal(step.assign.gather(1, step.index)[step.real], torch.arange(k).expand(2, -1)[step.real])


@pytest.mark.parametrize("how", ["bilinear", "adaptive"])
def test_the_same_grid_is_the_identity(how):
    tokens = clip(1, 27, 27, batch=1)
    rows = torch.tensor([[27]])
    step = getattr(resize, how)(tokens.place, rows, rows, 729)
    assert torch.equal(step.dense[0], torch.eye(729)) and torch.equal(step.apply(tokens).features, tokens.features)
    other = getattr(resize, how)(tokens.place, rows, rows - 1, 729)
    assert not torch.equal(other.dense[0], torch.eye(729))


def test_linspace_picks_evenly_row_by_row():
    tokens = clip()
    budget = torch.tensor([[7, 1, 0], [35, 2, 13]])
    step = resize.linspace(tokens.place, budget, 60)
    for row in range(2):
        wanted = [
            f * 35 + i for f in range(3) for i in torch.linspace(0, 34, int(budget[row, f])).double().round(decimals=3).long()
        ]
        assert step.index[row][step.real[row]].tolist() == wanted
    assert step.is_drop


def test_merging_reaches_every_budget_and_loses_nothing():
    tokens = clip()
    budget = torch.tensor([[7, 1, 35], [34, 18, 2]])
    step = resize.merged(tokens, budget, 60)
    after = step.apply(tokens)
    frames = torch.stack([(after.place.unit == f) & step.real for f in range(3)], 2).sum(1)
    assert torch.equal(frames, budget)
    total = (after.features * after.size[..., None]).masked_fill(~step.real[..., None], 0).sum(1)
    torch.testing.assert_close(total, tokens.features.sum(1), atol=1e-4, rtol=0)
    assert (step.assign >= 0).all()
    alone = resize.merged(tokens, torch.tensor([[0, 5, 0]] * 2), 10)
    assert alone.count().tolist() == [5, 5] and (alone.assign.view(2, 3, -1)[:, [0, 2]] == -1).all()


@pytest.mark.parametrize("size", SIZES)
def test_separable_merging_keeps_a_grid(size):
    tokens, (rows, cols) = clip(), grids([[size, (2, 2), (0, 0)]] * 2)
    step = resize.merged_by_axes(tokens, rows, cols, 40)
    assert step.count().tolist() == [size[0] * size[1] + 4] * 2
    after = step.apply(tokens)
    weight = (after.features * after.size[..., None]).masked_fill(~step.real[..., None], 0)
    torch.testing.assert_close(weight.sum(1), tokens.features[:, :70].sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(step.dense.sum(2)[step.real], torch.ones(int(step.real.sum())))


def test_separable_merging_merges_each_line_and_then_each_column():
    """Written out: two equal neighbours in every line, then two equal lines."""
    a, b, c, d = torch.eye(4)
    lines = torch.stack([torch.stack([a, b, b]), torch.stack([c, d, d]), torch.stack([c, d, d])])
    tokens = Tokens(lines.view(1, 9, 4), place=Place.clip(1, 1, 3, 3))
    step = resize.merged_by_axes(tokens, *grids([[(2, 2)]]), 4)
    assert torch.equal(step.apply(tokens).features[0], torch.stack([a, b, c, d])) and step.size.tolist() == [[1, 2, 2, 4]]


@pytest.mark.parametrize("how", ["bilinear", "adaptive", "linspace", "merged", "merged_by_axes"])
def test_padding_changes_nothing(how):
    tokens, (rows, cols) = clip(batch=1), grids([[(3, 4), (2, 2), (1, 3)]])
    place = {n: F.pad(v, (0, 9), value=-1) for n, v in vars(tokens.place).items() if isinstance(v, torch.Tensor)}
    mask = torch.arange(114)[None] < 105
    padded = Tokens(F.pad(tokens.features, (0, 0, 0, 9), value=5.0), mask=mask, place=Place(**place, units=3, sides=(5, 7)))

    def made(each):
        if how == "merged":
            return resize.merged(each, rows * cols, 25)
        if how == "merged_by_axes":
            return resize.merged_by_axes(each, rows, cols, 25)
        if how == "linspace":
            return resize.linspace(each.place, rows * cols, 25, each.mask)
        return getattr(resize, how)(each.place, rows, cols, 25, each.mask)

    one, two = made(tokens), made(padded)
    real = one.real[0]
    assert torch.equal(real, two.real[0]) and torch.equal(one.index[0][real], two.index[0][real])
    torch.testing.assert_close(one.dense[0][real], two.dense[0, :, :105][real])
    assert (two.assign[0, 105:] == -1).all() and torch.equal(one.assign[0], two.assign[0, :105])


def test_a_grid_fits_its_budget_and_the_shape_of_the_frame():
    budget = torch.arange(0, 400)
    rows, cols = resize.grid_within(budget, 27, 27)
    side = budget.double().sqrt().floor().long()
    assert ((rows * cols) <= budget).all() and (rows[1:] - cols[1:] >= 0).all() and (cols >= side - 1).all()
    assert (rows[0], cols[0]) == (0, 0) and ((rows == side) | (rows == side + 1)).all()
    rows, cols = resize.grid_within(torch.arange(1, 61), 20, 3)
    assert (rows <= 20).all() and (cols <= 3).all() and (rows * cols <= torch.arange(1, 61)).all()
    assert (rows[-1], cols[-1]) == (20, 3)
