"""Square grids: which cell lies in which window, pooling, and positions, by hand."""

import pytest
import torch

from jeton.ops.squares import pool, resize, side, waves, window_of, windows

GRID = torch.arange(16.0).view(1, 16, 1)


def test_windows_are_squares_row_by_row():
    assert windows(GRID, 2)[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pooling_by_hand():
    assert pool(GRID, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool(GRID, 1).flatten().tolist() == [7.5]
    assert pool(GRID, 16) is GRID and pool(GRID, None) is GRID


def test_pools_nest():
    x = torch.randn(2, 576, 8)
    torch.testing.assert_close(pool(x, 36), pool(pool(x, 144), 36), atol=1e-6, rtol=0)
    x = x[:, torch.randperm(576)]
    assert not torch.allclose(pool(x, 36), x.view(2, 36, 16, 8).mean(2), atol=1e-6)  # runs of 16 are no windows


def test_what_is_no_square_is_refused_with_what_would_be():
    with pytest.raises(ValueError, match=r"choose one of \[16, 4, 1\]"):
        window_of(9, 16)
    with pytest.raises(ValueError, match="choose one of"):
        window_of(0, 16)
    with pytest.raises(ValueError, match="class token"):
        side(17)
    with pytest.raises(ValueError, match="do not tile"):
        windows(GRID, 3)


def test_resizing_to_half_the_side_is_the_mean_of_four():
    torch.testing.assert_close(resize(GRID, 2), pool(GRID, 4))
    assert resize(GRID.bfloat16(), 2).dtype == torch.bfloat16


def test_waves_tell_columns_and_rows_apart():
    table = waves(3, 8)
    assert table.shape == (9, 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(table[5][[0, 4]], torch.tensor([2.0, 1.0]).sin())  # column 2, row 1
    assert torch.equal(table[1, 4:], table[0, 4:]) and torch.equal(table[3, :4], table[0, :4])
    with pytest.raises(ValueError, match="multiple of 4"):
        waves(3, 6)
