"""Cells cut a grid into exactly k rectangles."""

from __future__ import annotations

import pytest
import torch

from jeton.ops import grid
from jeton.place import Place


@pytest.mark.parametrize(("h", "w"), [(6, 6), (4, 9), (1, 7), (5, 1), (24, 24)])
def test_every_count_gives_that_many_rectangles_that_cover_the_grid(h, w):
    place = Place.grid(1, h, w)
    for k in range(1, h * w + 1) if h < 20 else (7, 64, 144, 500, 575):
        label, _ = grid.cells(place, torch.tensor([[k]]))
        assert label.unique().tolist() == list(range(k))
        if k % 5 == 0:
            for cell in range(k):
                rows, cols = place.row[label == cell], place.col[label == cell]
                assert len(rows) == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)


def test_squares_that_reach_over_the_border():
    found = grid.tiles(3, 5, 2)
    assert found.tolist() == [
        [0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1], [10, 11, -1, -1], [12, 13, -1, -1], [14, -1, -1, -1],
    ]  # fmt: skip


def test_cells_hand_case():
    label, off = grid.cells(Place.grid(1, 4, 4), torch.tensor([[5]]))
    # two rows of cells (sqrt 5 rounds to 2), two cells above, three below (columns 2, 1, 1)
    assert label.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 4], [2, 2, 3, 4]]
    assert grid.central(label, off, 5)[0].unique().tolist() == [0, 2, 8, 10, 11]


def test_the_central_token_represents_its_cell():
    label, off = grid.cells(Place.grid(1, 3, 6), torch.tensor([[2]]))
    assert grid.central(label, off, 2)[0].unique().tolist() == [7, 10]


def test_cells_respect_the_border_of_the_real_tokens():
    place = Place.grid(2, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = mask[1, 3] = False
    label, _ = grid.cells(place, torch.tensor([[8], [8]]), mask.flatten(1))
    assert label[1].reshape(4, 4).tolist() == [[-1] * 4, [0, 1, 2, 3], [4, 5, 6, 7], [-1] * 4]
    assert label[0].unique().numel() == 8


@pytest.mark.parametrize(
    ("k", "h", "w", "expected"),
    [
        (64, 24, 24, (8, 8)),
        (60, 24, 24, (7, 8)),
        (1, 9, 9, (1, 1)),
        (32, 8, 16, (4, 8)),
        (100, 4, 5, (4, 5)),
        (3, 1, 9, (1, 3)),
    ],
)
def test_the_smaller_grid_fits_the_budget_and_the_shape(k, h, w, expected):
    rows, cols = grid.fit(*(torch.tensor(value) for value in (k, h, w)))
    assert (int(rows), int(cols)) == expected


def test_the_smaller_grid_never_exceeds_the_budget():
    k, h, w = torch.meshgrid(torch.arange(1, 80), torch.arange(1, 13), torch.arange(1, 13), indexing="ij")
    rows, cols = grid.fit(k, h, w)
    assert (rows * cols <= k).all() and (rows <= h).all() and (cols <= w).all() and (rows >= 1).all() and (cols >= 1).all()
