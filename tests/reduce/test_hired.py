"""HiRED against its card."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.place import Place
from jeton.tokens import Tokens


def hired(place, early, late=None, **fields):
    n = early.shape[1]
    late = torch.rand(1, n, generator=torch.Generator().manual_seed(0)) if late is None else late
    tokens = Tokens(torch.randn(1, n, 2), place=place)
    step = get("hired", **fields).reduce(tokens, {"early": early, "late": late})
    return torch.bincount(place.unit[0][step.index[0][step.real[0]]], minlength=place.units).tolist(), step


def test_counts_of_the_card(anyres):
    place = anyres(2, 2, 24, 24)
    counts, step = hired(place, torch.rand(1, 2880))
    assert step.k == 576 and counts[0] == 288 and sum(counts[1:]) == 288


def early_in(place: Place, per_quadrant: list[int]) -> torch.Tensor:
    """Early attention under which exactly so many of the top thumbnail tokens lie in each quadrant of the thumbnail."""
    early = torch.zeros(1, place.unit.shape[1])
    for quadrant, number in enumerate(per_quadrant):
        inside = (
            (place.unit[0] == 0)
            & (place.row[0] * 2 // place.height[0] == quadrant // 2)
            & (place.col[0] * 2 // place.width[0] == quadrant % 2)
        )
        early[0, inside.nonzero().flatten()[:number]] = 1.0
    return early


def test_the_crops_share_by_what_is_counted_in_their_region(anyres):
    place = anyres(2, 2, 16, 16)  # 128 of 256 thumbnail tokens are salient
    early = early_in(place, [60, 40, 20, 8])
    counts, _ = hired(place, early, keep=200)
    assert counts == [100, 47, 31, 16, 6]  # 46.875, 31.25, 15.625, 6.25 of 100: two left over, to .875 and .625
    floors, step = hired(place, early, keep=200, redistribute=False)
    assert floors == [100, 46, 31, 15, 6] and step.count().tolist() == [198]


def test_a_bright_quadrant_raises_its_crop_and_reference_strips_miss_it(anyres):
    place = anyres(2, 2, 8, 8)
    bright = (place.unit == 0) & (place.row >= 4) & (place.col >= 4)
    early = bright.float() + 0.01 * torch.rand(1, 320, generator=torch.Generator().manual_seed(0))
    counts, _ = hired(place, early, keep=64, alpha=0.75)
    assert counts[4] == 16 and counts[1:4] == [0, 0, 0]
    strips, _ = hired(place, early, keep=64, alpha=0.75, reference_strips=True)
    assert strips[4] != 16  # the twin: strips of rows are not quadrants
    assert strips[3] == strips[4] == 8


@pytest.mark.parametrize("rows_cols", [(1, 2), (3, 1), (2, 3)])
def test_other_crop_grids_find_their_region_too(anyres, rows_cols):
    rows, cols = rows_cols
    place = anyres(rows, cols, 6, 6)
    last = (place.unit == 0) & (place.row >= 6 - 6 // rows) & (place.col >= 6 - 6 // cols)
    counts, _ = hired(place, last.float(), keep=20, alpha=0.9)
    assert counts[-1] == max(counts[1:]) > 0


@pytest.mark.parametrize("keep", [1, 2, 7, 100, 319, 320, 0.2, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_budget_is_met_exactly(anyres, keep, alpha):
    place = anyres(2, 2, 8, 8)
    counts, step = hired(place, torch.rand(1, 320), keep=keep, alpha=alpha)
    assert sum(counts) == step.k == get("hired", keep=keep).promise(320).count and step.mask is None


def test_without_redistribution_the_budget_is_never_exceeded(anyres):
    place = anyres(2, 2, 8, 8)
    for seed in range(20):
        early = torch.rand(1, 320, generator=torch.Generator().manual_seed(seed))
        counts, _ = hired(place, early, keep=41 + seed, redistribute=False)
        assert sum(counts) <= 41 + seed
    assert not get("hired", redistribute=False).promise(320).exact


def test_a_single_picture_keeps_its_best():
    late = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    step = get("hired", keep=2).reduce(Tokens(torch.randn(1, 4, 2), place=Place.grid(1, 2, 2)), {"late": late})
    assert step.index.tolist() == [[1, 3]]


def test_frames_have_no_thumbnail_and_share_by_size():
    unit = torch.arange(4).repeat_interleave(9)[None]
    one = torch.ones_like(unit)
    place = Place(unit, unit, unit, 3 * one, 3 * one, 4, 0 * one, 0 * one, one, one)
    counts, _ = hired(place, torch.rand(1, 36), keep=8)
    assert counts == [2, 2, 2, 2]


def test_rows_of_different_kinds_are_reduced_as_they_are_alone(anyres):
    many, few = anyres(2, 2, 4, 4), anyres(1, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    early, late = torch.rand(3, 80, generator=generator), torch.rand(3, 80, generator=generator)
    fields = {}
    for name in ("unit", "row", "col", "height", "width", "crop_row", "crop_col", "crop_rows", "crop_cols"):
        rows = torch.full((3, 80), -1)
        rows[0], rows[1, :48] = getattr(many, name)[0], getattr(few, name)[0]
        rows[2, :16] = 1 if name in ("crop_rows", "crop_cols") else getattr(many, name)[0, :16]
        fields[name] = rows
    mask = fields["unit"] >= 0
    batch = get("hired", keep=0.25).reduce(
        Tokens(torch.randn(3, 80, 2), mask=mask, place=Place(**fields, units=5)), {"early": early, "late": late}
    )
    singles = [many, few, None]
    for b, place in enumerate(singles):
        n = int(mask[b].sum())
        tokens = Tokens(torch.randn(1, n, 2), place=place)
        alone = get("hired", keep=0.25).reduce(tokens, {"early": early[b : b + 1, :n], "late": late[b : b + 1, :n]})
        assert torch.equal(batch.index[b][batch.real[b]], alone.index[0])
