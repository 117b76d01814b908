"""GlobalCom² against its card."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tiny
from jeton.engine import apply
from jeton.layout import Album
from jeton.method import get
from jeton.models import adapt
from jeton.needs import ClassAttention, ReceivedAttention
from jeton.ops.crops import block_sums, enlarged
from jeton.place import Place
from jeton.reduce.globalcom2 import crop_ratios
from jeton.tokens import Tokens

SIZES = [(40, 46), (20, 47), (16, 70), (48, 23), (48, 48)]  # of pictures that LLaVA-NeXT cuts into crops, most with padding


def padded_place(size: tuple[int, int]) -> Place:
    """Thumbnail and unpadded crops of a picture as the tiny LLaVA-NeXT lays them out, without newlines."""
    view = adapt(tiny.model("LlavaNextForConditionalGeneration"))
    place = Album.of(tuple(view.geometry({"image_sizes": torch.tensor([size])}, "image")), "cpu").place
    return place.gather((place.unit[0] >= 0).nonzero().T)


def kept(place: Place, score: torch.Tensor, **fields):
    step = get("globalcom2", **fields).reduce(Tokens(torch.randn(1, score.shape[1], 2), place=place), {"attention": score})
    index = step.index[0][step.real[0]]
    return index.tolist(), torch.bincount(place.unit[0][index], minlength=place.units).tolist()


def test_crop_ratios_of_the_card():
    crop = torch.tensor([[False, True, True, True, True]])
    sums = torch.tensor([[99.0, 20.0, 10.0, 10.0, 0.0]])
    got = crop_ratios(sums, crop, 0.25)[0]
    torch.testing.assert_close(got[1:], torch.tensor([0.32111, 0.23665, 0.23665, 0.20558]).double(), atol=5e-6, rtol=0)
    assert got[0] == 0 and got[1:].mean().item() == pytest.approx(0.25, abs=1e-12)
    twin = crop_ratios(sums, crop, 0.25, temperature=1.0)[0]
    assert (twin - got).abs().max() > 0.05
    same = crop_ratios(torch.full((1, 5), 7.0), crop, 0.25)[0, 1:]
    torch.testing.assert_close(same, torch.full((4,), 0.25).double())
    assert crop_ratios(torch.tensor([[0.0, 90.0, 0.0, 0.0, 0.0]]), crop, 0.9)[0, 1] == 1  # clipped


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_the_ratios_is_the_ratio_for_any_scores(seed):
    sums = 30 * torch.randn(1, 7, generator=torch.Generator().manual_seed(seed))
    crop = torch.arange(7)[None] > 0
    assert crop_ratios(sums, crop, 0.25)[0, 1:].mean().item() == pytest.approx(0.25, abs=1e-12)


def test_blocks_are_floored_and_the_last_takes_the_rest(anyres):
    place = anyres(2, 3, 7, 7)
    score = (place.unit == 0).float()
    assert block_sums(score, place).tolist() == [[0, 6, 6, 9, 8, 8, 12]]


@pytest.mark.parametrize("size", SIZES)
def test_the_thumbnail_is_stretched_over_the_real_part_of_the_crops(size):
    place = padded_place(size)
    n = place.unit.shape[1]
    score = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    small = score[0, place.unit[0] == 0].reshape(1, 1, 6, 6)
    y = (place.crop_row * place.height + place.row)[place.unit > 0]
    x = (place.crop_col * place.width + place.col)[place.unit > 0]
    y, x = y - y.min(), x - x.min()
    shape = (int(y.max()) + 1, int(x.max()) + 1)
    large = F.interpolate(small, size=shape, mode="bilinear", align_corners=False)[0, 0]
    got = enlarged(score, place)
    torch.testing.assert_close(got[place.unit > 0], large[y, x], atol=1e-5, rtol=0)
    assert (got[place.unit == 0] == 0).all()
    twin = F.interpolate(small, size=shape, mode="bilinear", align_corners=True)[0, 0]
    assert (got[place.unit > 0] - twin[y, x]).abs().max() > 0.05


def published(place: Place, score: torch.Tensor, ratio: float) -> list[int]:
    """The steps as the card lists them, crop by crop, with floors."""
    unit, score = place.unit[0], score[0].double()
    rows, cols = int(place.crop_rows.max()), int(place.crop_cols.max())
    here = (unit == 0).nonzero().flatten()
    small = score[here].reshape(6, 6)
    out = here[score[here].argsort(descending=True)[: int(36 * ratio)]].tolist()
    down, across = 6 // rows, 6 // cols
    sums = [
        small[r * down : 6 if r == rows - 1 else (r + 1) * down, c * across : 6 if c == cols - 1 else (c + 1) * across].sum()
        for r in range(rows)
        for c in range(cols)
    ]
    weight = (torch.stack(sums) / 10).softmax(0)
    share = (ratio * (1 + weight - weight.mean())).clamp(max=1)
    y = place.crop_row[0] * 6 + place.row[0]
    x = place.crop_col[0] * 6 + place.col[0]
    y0, x0 = y[unit > 0].min(), x[unit > 0].min()
    shape = (int(y[unit > 0].max() - y0) + 1, int(x[unit > 0].max() - x0) + 1)
    large = F.interpolate(small[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
    for p in range(rows * cols):
        own = (unit == p + 1).nonzero().flatten()
        local, seen = score[own], large[y[own] - y0, x[own] - x0]
        both = local / local.norm() + seen / seen.norm()
        out += own[both.argsort(descending=True)[: int(len(own) * share[p])]].tolist()
    return sorted(out)


@pytest.mark.parametrize("ratio", [0.25, 0.1, 0.6])
@pytest.mark.parametrize("size", SIZES)
def test_without_redistribution_it_equals_the_published_steps(size, ratio):
    place = padded_place(size)
    score = 2 * torch.randn(1, place.unit.shape[1], generator=torch.Generator().manual_seed(1))  # logits: some are negative
    expected = published(place, score, ratio)
    assert kept(place, score, keep=ratio, redistribute=False)[0] == expected
    clamped = kept(place, score.clamp(min=0), keep=ratio, redistribute=False)[0]
    assert clamped != expected  # the twin: logits are not probabilities


def test_with_an_even_thumbnail_only_local_scores_rank(anyres):
    place = anyres(2, 2, 6, 6)
    score = torch.randn(1, 180, generator=torch.Generator().manual_seed(0))
    score[place.unit == 0] = 0.5
    index, counts = kept(place, score, keep=0.25)
    assert counts == [9] * 5
    for p in range(1, 5):
        own = (place.unit[0] == p).nonzero().flatten()
        best = own[score[0, own].argsort(descending=True)[:9]].sort().values.tolist()
        assert [i for i in index if i in own] == best
    score[place.unit == 0] = torch.arange(36.0)  # the twin: an uneven one changes the choice
    assert kept(place, score, keep=0.25)[0] != index


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (1, 2), (3, 1), (2, 3)])
def test_a_bright_part_of_the_thumbnail_raises_its_crop(anyres, rows, cols):
    place = anyres(rows, cols, 12, 12)
    for r, c in ((0, 0), (rows - 1, cols - 1)):
        bright = (place.unit == 0) & (place.row * rows // 12 == r) & (place.col * cols // 12 == c)
        _, counts = kept(place, bright.float(), keep=0.25)
        own, opposite = 1 + r * cols + c, rows * cols - r * cols - c
        assert counts[own] == max(counts[1:]) and counts[own] > counts[opposite]
    _, even = kept(place, torch.ones_like(place.unit).float(), keep=0.25)
    assert max(even[1:]) - min(even[1:]) == 0  # the twin


@pytest.mark.parametrize("size", [(48, 48), (40, 46)])
def test_keeping_all_leaves_the_packing_as_it_is_newlines_included(size):
    net = tiny.model("LlavaNextForConditionalGeneration")
    inputs = tiny.prompts(net, [tiny.Sample((size,), (4, 9), 1)])
    before = tiny.run(net, inputs)
    with apply(net, "globalcom2", keep=1.0):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "globalcom2", keep=0.9) as run:  # the twin, with its newlines
        assert (tiny.run(net, inputs)[:, -1] - before[:, -1]).abs().max() > 1e-3
        patches = padded_place(size).unit.shape[1]
        newlines = run.layout.album.structure[0]
        assert run.report().images[0].after == round(0.9 * patches) + newlines


@pytest.mark.parametrize("keep", [1, 2, 7, 45, 100, 0.1, 0.25, 0.5, 0.97])
@pytest.mark.parametrize("size", SIZES)
def test_the_budget_is_met_exactly(size, keep):
    place = padded_place(size)
    n = place.unit.shape[1]
    index, _ = kept(place, 3 * torch.randn(1, n, generator=torch.Generator().manual_seed(2)), keep=keep)
    assert len(index) == get("globalcom2", keep=keep).promise(n).count
    assert not get("globalcom2", redistribute=False).promise(n).exact


def test_every_image_of_a_batch_listens_to_its_own_thumbnail(anyres):
    place = anyres(2, 2, 4, 4)
    both = Place(**{k: v.expand(2, -1) if isinstance(v, torch.Tensor) else v for k, v in vars(place).items()})
    score = 2 * torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    method = get("globalcom2", keep=20)
    batch = method.reduce(Tokens(torch.randn(2, 80, 2), place=both), {"attention": score})
    alone = [kept(place, score[b : b + 1], keep=20)[0] for b in range(2)]
    assert batch.index.tolist() == alone
    mixed = torch.where(place.unit == 0, score[:1], score[1:])  # the twin: the released code's first thumbnail for all
    assert kept(place, mixed, keep=20)[0] != alone[1]


def test_frames_share_by_size_and_rank_by_their_own_scores():
    unit = torch.arange(4).repeat_interleave(9)[None]
    one = torch.ones_like(unit)
    place = Place(unit, unit, unit, 3 * one, 3 * one, 4, 0 * one, 0 * one, one, one)
    index, counts = kept(place, torch.arange(36.0)[None], keep=8)
    assert counts == [2] * 4 and index == [7, 8, 16, 17, 25, 26, 34, 35]


def test_it_reads_logits():
    assert get("globalcom2").needs() == {"attention": ClassAttention(layer=-1, logits=True)}
    assert get("globalcom2", score="received", layer=-2).needs() == {"attention": ReceivedAttention(layer=-2)}


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": float("nan")}, {"score": "last"}, {"keep": 0.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError):
        get("globalcom2", **fields)
