"""Boxes by hand, and spans taken out of vectors."""

from __future__ import annotations

import pytest
import torch

from jeton.ops.boxes import area, clip, hull, intersection, iou, merge_neighbours, quadrants
from jeton.ops.projection import project_out, row_space


def box(*edges):
    return torch.tensor([list(map(float, one)) for one in edges])


def test_overlap_by_hand():
    a = box((0, 0, 4, 4), (10, 10, 12, 12))
    b = box((2, 2, 6, 6), (0, 0, 4, 4), (4, 0, 8, 4), (5, 5, 5, 9))
    assert area(b).tolist() == [16, 16, 16, 0] and area(box((4, 0, 2, 6))).tolist() == [0]
    assert intersection(a, b)[0].tolist() == [4, 16, 0, 0]  # touching is not sharing
    assert iou(a, b)[0].tolist() == pytest.approx([4 / 28, 1, 0, 0])
    assert iou(a, b)[1].tolist() == [0, 0, 0, 0]
    assert iou(b[3:], b[3:]).tolist() == [[0]]  # two empty boxes


def test_hull_and_clip():
    assert hull(box((0, 5, 4, 6), (2, 1, 3, 9))).tolist() == [0, 1, 4, 9]
    assert clip(box((-5, 2, 130, 90)), 101, 80).tolist() == [[0, 2, 101, 80]]


def test_quadrants_of_odd_sides_tile_the_picture():
    grid = quadrants(101, 99)
    assert grid.tolist() == [[0, 0, 50, 49], [50, 0, 101, 49], [0, 49, 50, 99], [50, 49, 101, 99]]
    assert area(grid).sum() == 101 * 99 and intersection(grid, grid).triu(1).sum() == 0


def test_neighbours_merge_until_none_is_left_and_only_above_the_threshold():
    chain = box((100, 0, 110, 10), (0, 0, 10, 10), (4, 0, 14, 10), (6, 0, 18, 10))
    # IoU 6/14 of the second and third, 8/14 of the third and fourth, 4/18 of the second and fourth before any has grown
    merged = merge_neighbours(chain, 0.3)
    assert sorted(merged.tolist()) == [[0, 0, 18, 10], [100, 0, 110, 10]]
    assert len(merge_neighbours(chain, 0.9)) == 4
    equal = box((0, 0, 10, 10), (0, 0, 10, 5))
    assert len(merge_neighbours(equal, 0.5)) == 2 and len(merge_neighbours(equal, 0.49)) == 1  # strict
    assert merge_neighbours(torch.zeros(0, 4), 0.3).shape == (0, 4)


def test_taking_a_direction_out_by_hand():
    x, e1 = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    assert project_out(x, e1).tolist() == [[0, 4]]
    assert project_out(x, e1, 0.5).tolist() == [[1.5, 4]]
    assert project_out(x, e1, 0) is x


def test_a_span_does_not_mind_repeated_or_dependent_rows():
    torch.manual_seed(0)
    rows = torch.randn(3, 8)
    basis = row_space(rows)
    more = row_space(torch.cat([rows, rows[:2], rows.sum(0, keepdim=True), torch.zeros(1, 8)]))
    assert basis.shape == more.shape == (8, 3)
    assert torch.allclose(basis @ basis.mT, more @ more.mT, atol=1e-5)
    assert torch.allclose(basis.mT @ basis, torch.eye(3), atol=1e-5)
    centred = row_space(rows - rows.mean(0))
    assert not torch.allclose(basis @ basis.mT, centred @ centred.mT, atol=1e-2)


def test_tolerance_and_rank_bound_a_span():
    rows = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 1e-5]))
    assert row_space(rows).shape[1] == 3 and row_space(rows, tolerance=0.6).shape[1] == 1
    assert row_space(rows, rank=2).abs().tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert row_space(torch.zeros(2, 4)).shape == (4, 0) and row_space(torch.zeros(0, 4)).shape == (4, 0)


def test_half_precision_is_projected_in_float32():
    torch.manual_seed(0)
    x, rows = 30 * torch.randn(20, 64), torch.randn(6, 64)
    basis = row_space(rows.half())
    assert basis.dtype == torch.float32
    out = project_out(x.half(), basis)
    rounding = x.half().abs().max() * 2**-11 * 8
    assert out.dtype == torch.float16 and (out.float() @ basis).abs().max() < rounding
    low = basis.half()
    coarse = x.half() - (x.half() @ low) @ low.mT
    assert (out.float() @ basis).norm() < (coarse.float() @ basis).norm()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        row_space(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="rank"):
        row_space(torch.zeros(2, 4), rank=0)
    with pytest.raises(ValueError, match="width 5"):
        project_out(torch.zeros(2, 5), torch.zeros(4, 1))
