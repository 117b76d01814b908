"""FoPru against its card."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.needs import ClassAttention, ReceivedAttention
from jeton.place import Place
from jeton.tokens import Tokens

CARD = torch.tensor([[0.9, 0.1, 0.1, 0.4, 0.4, 0.4]])


def kept(score, height, width, **fields):
    tokens = Tokens(torch.randn(len(score), height * width, 2), place=Place.grid(len(score), height, width))
    step = get("fopru", **fields).reduce(tokens, {"attention": score})
    return [row[real].tolist() for row, real in zip(step.index, step.real, strict=True)]


def test_rank_keeps_the_highest_and_row_whole_rows():
    assert kept(CARD, 2, 3, keep=3) == [[0, 3, 4]]
    assert kept(CARD, 2, 3, keep=3, select="row") == [[3, 4, 5]]


def test_the_last_row_gives_its_best_tokens_or_none():
    assert kept(CARD, 2, 3, keep=4, select="row") == [[0, 3, 4, 5]]
    assert kept(CARD, 2, 3, keep=5, select="row") == [[0, 1, 3, 4, 5]]
    assert kept(CARD, 2, 3, keep=5, select="row", partial_row=False) == [[3, 4, 5]]
    assert kept(CARD, 2, 3, keep=2, select="row", partial_row=False) == [[3, 4]]  # no row fits: never nothing
    assert not get("fopru", select="row", partial_row=False).promise(6).exact


def row_by_row(score, height, width, k):
    """The rule, written out."""
    rows = sorted(range(height), key=lambda r: (-score[r * width : (r + 1) * width].mean().item(), r))
    out = []
    for r in rows:
        cells = range(r * width, (r + 1) * width)
        out += sorted(cells, key=lambda i: (-score[i].item(), i))
    return sorted(out[:k])


@pytest.mark.parametrize("seed", range(6))
def test_row_equals_the_rule_written_out(seed):
    score = torch.rand(2, 35, generator=torch.Generator().manual_seed(seed))
    for k in (1, 6, 7, 19, 35):
        expected = [row_by_row(row, 5, 7, k) for row in score]
        assert kept(score, 5, 7, keep=k, select="row") == expected
        turned = [row_by_row(row, 7, 5, k) for row in score]
        assert k == 35 or turned != expected  # the twin: the grid's shape matters


def test_equal_rows_are_not_torn_apart():
    score = torch.full((1, 12), 0.25)
    assert kept(score, 3, 4, keep=6, select="row") == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("select", ["rank", "row"])
@pytest.mark.parametrize("seed", range(5))
def test_kept_indices_ascend_whatever_the_order_of_the_scores(select, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.linspace(0, 1, 30)[torch.randperm(30, generator=generator)][None]
    (index,) = kept(score, 5, 6, keep=11, select=select)
    assert index == sorted(set(index)) and len(index) == 11


@pytest.mark.parametrize("fields", [{}, {"select": "row"}, {"scope": "crop"}, {"select": "row", "scope": "crop"}])
def test_keeping_all_is_the_identity(anyres, fields):
    tokens = Tokens(torch.randn(1, 80, 2), place=anyres(2, 2, 4, 4))
    for keep in (80, 1.0):
        assert get("fopru", keep=keep, **fields).reduce(tokens, {"attention": torch.rand(1, 80)}).is_identity


def test_rows_are_those_of_the_stitched_picture(anyres):
    place = anyres(1, 3, 4, 4)  # a wide picture: thumbnail, then three crops side by side
    score = torch.full((1, 64), 0.01)
    line = (place.unit > 0) & (place.row == 2)
    score[line & (place.unit == 1)] = 0.9  # bright in the first crop only
    score[(place.unit == 3) & (place.row == 0)] = 0.5
    score[(place.unit == 3) & (place.row == 2)] = 0.4
    tokens = Tokens(torch.randn(1, 64, 2), place=place)

    def of(**fields):
        step = get("fopru", select="row", keep=12, **fields).reduce(tokens, {"attention": score})
        return place.unit[0][step.index[0]].tolist(), place.row[0][step.index[0]].tolist()

    assert of() == ([1] * 4 + [2] * 4 + [3] * 4, [2] * 12)  # the third row through all three crops
    units, rows = of(scope="crop")  # the twin: each crop's own best row
    assert units == sorted([0, 1, 2, 3] * 3) and rows[-3:] == [0] * 3


def test_crops_share_the_budget_by_size_only_under_scope_crop(anyres):
    place = anyres(2, 2, 4, 4)
    tokens = Tokens(torch.randn(1, 80, 2), place=place)
    for select in ("rank", "row"):
        made = {scope: get("fopru", keep=20, select=select, scope=scope) for scope in ("image", "crop")}
        counts = {
            scope: torch.bincount(place.unit[0][method.reduce(tokens, {"attention": torch.arange(80.0)[None]}).index[0]])
            for scope, method in made.items()
        }
        assert counts["crop"].tolist() == [4] * 5
        assert counts["image"].sum() == 20 and counts["image"].tolist() != [4] * 5


def test_permuting_heads_changes_nothing():
    attention = torch.rand(2, 6, 30, generator=torch.Generator().manual_seed(0))
    assert kept(attention, 5, 6, keep=9) == kept(attention[:, torch.randperm(6)], 5, 6, keep=9)
    assert kept(attention, 5, 6, keep=9) != kept(attention.cumsum(1), 5, 6, keep=9)  # the twin: heads do not weigh alike


def test_sinks_are_kept_unless_they_are_left_aside():
    score = torch.rand(1, 36, generator=torch.Generator().manual_seed(0)) + 1
    score[0, [7, 20]] = 50.0
    assert {7, 20} <= set(kept(score, 6, 6, keep=9)[0])
    clean = kept(score, 6, 6, keep=9, outlier_clip=1.5)[0]
    assert not {7, 20} & set(clean) and len(clean) == 9
    without = score.clone()
    without[0, [7, 20]] = 0
    assert clean == kept(without, 6, 6, keep=9)[0]
    assert len(set(kept(score, 6, 6, keep=6, select="row")[0]) & {6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23}) == 6
    row = kept(score, 6, 6, keep=9, select="row", outlier_clip=1.5)[0]
    assert len(row) == 9 and row != kept(score, 6, 6, keep=9, select="row")[0]
    assert len(kept(score, 6, 6, keep=36, outlier_clip=1.5)[0]) == 36  # aside, not lost


def test_it_asks_for_what_tokens_receive_unless_told_otherwise():
    assert get("fopru").needs() == {"attention": ReceivedAttention(layer=-1)}
    assert get("fopru", score="class").needs() == {"attention": ClassAttention(layer=-1)}


def test_padded_rows_of_pictures_are_taken_as_they_are_alone(anyres):
    many, few = anyres(2, 2, 4, 4), anyres(1, 2, 4, 4)
    fields = {}
    for name in ("unit", "row", "col", "height", "width", "crop_row", "crop_col", "crop_rows", "crop_cols"):
        rows = torch.full((2, 80), -1)
        rows[0], rows[1, :48] = getattr(many, name)[0], getattr(few, name)[0]
        fields[name] = rows
    mask, score = fields["unit"] >= 0, torch.rand(2, 80, generator=torch.Generator().manual_seed(0))
    for extra in ({}, {"scope": "crop"}, {"partial_row": False}, {"outlier_clip": 0.5}):
        method = get("fopru", keep=0.3, select="row", **extra)
        batch = method.reduce(Tokens(torch.randn(2, 80, 2), mask=mask, place=Place(**fields, units=5)), {"attention": score})
        for b, place in enumerate((many, few)):
            n = int(mask[b].sum())
            alone = method.reduce(Tokens(torch.randn(1, n, 2), place=place), {"attention": score[b : b + 1, :n]})
            assert torch.equal(batch.index[b][batch.real[b]], alone.index[0][alone.real[0]])


@pytest.mark.parametrize("fields", [{"select": "column"}, {"scope": "frame"}, {"score": "last"}, {"outlier_clip": -1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError):
        get("fopru", **fields)


def test_rows_need_a_place():
    with pytest.raises(ValueError, match="place"):
        get("fopru", select="row", keep=2).reduce(Tokens(torch.randn(1, 6, 2)), {"attention": CARD})
