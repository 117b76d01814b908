"""Token-level correlation-guided compression against its card."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPVisionConfig, CLIPVisionModel

import tiny
from jeton.engine import apply
from jeton.method import get
from jeton.ops.neighbours import nearest, twins
from jeton.ops.outliers import outliers, quantile, upper_fence
from jeton.ops.selection import gumbel
from jeton.place import Place
from jeton.tokens import Tokens


def reduced(early=None, late=None, keys=None, place=None, mask=None, x=None, **fields):
    n = next(signal.shape[1] for signal in (early, late, keys) if signal is not None)
    early = torch.ones(1, n) if early is None else early
    late = torch.ones(1, n) if late is None else late
    keys = torch.eye(n)[None] if keys is None else keys
    x = torch.randn(len(keys), n, 4, generator=torch.Generator().manual_seed(0)) if x is None else x
    tokens = Tokens(x, mask=mask, place=place)
    return get("token-correlation", **fields).reduce(tokens, {"early": early, "late": late, "keys": keys}), x


def kept(step, b=0):
    return step.index[b][step.real[b]].tolist()


# -- which scores stand out ----------------------------------------------------------------------------------------------


def test_the_interquartile_example_of_the_card():
    score = torch.tensor([[1.0, 1, 1, 1, 2, 2, 2, 3, 10]])
    unit = torch.zeros_like(score).long()
    assert [quantile(score, q, unit, 1).item() for q in (0.25, 0.75)] == [1, 2]
    assert upper_fence(score, unit, 1).item() == 3.5
    assert outliers(score, unit, 1).nonzero().tolist() == [[0, 8]]
    assert outliers(score, unit, 1, factor=0.5).sum() == 2  # the twin


def test_quantiles_of_each_unit_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    score, unit = torch.randn(3, 40, generator=generator), torch.randint(0, 4, (3, 40), generator=generator)
    mask = torch.rand(3, 40, generator=generator) < 0.8
    for q in (0.0, 0.25, 0.6, 1.0):
        got = quantile(score, q, unit, 4, mask)
        for b in range(3):
            for u in range(4):
                expected = score[b][(unit[b] == u) & mask[b]].quantile(q)
                torch.testing.assert_close(got[b, u], expected)


def test_twins_and_nearest_look_within_the_unit_only():
    generator = torch.Generator().manual_seed(0)
    x, unit = torch.randn(2, 300, 3, generator=generator), torch.randint(0, 3, (2, 300), generator=generator)
    anchor = torch.rand(2, 300, generator=generator) < 0.1
    near = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    same = unit[:, :, None] == unit[:, None]
    expected = ((near > 0.7) & same).sum(2) - 1  # without itself
    assert torch.equal(twins(x, 0.7, unit), expected)
    assert not torch.equal(twins(x, 0.7, torch.zeros_like(unit)), expected)  # the twin: crops are not one picture
    best = near.masked_fill(~(same & anchor[:, None]), -torch.inf).argmax(2)
    assert torch.equal(nearest(x, anchor, unit), best)
    assert (nearest(x, torch.zeros_like(anchor), unit) == -1).all()


# -- how many ------------------------------------------------------------------------------------------------------------


def test_a_blank_crop_keeps_only_what_stands_out():
    blank = torch.ones(1, 20, 4)
    late = torch.ones(1, 20)
    late[0, [3, 11]] = 5
    assert kept(reduced(late=late, keys=blank)[0]) == [3, 11]
    step, _ = reduced(keys=blank)
    assert step.count().tolist() == [1]  # never nothing


def test_a_crop_of_orthogonal_keys_keeps_everything():
    step, x = reduced(early=torch.rand(1, 20))
    assert kept(step) == list(range(20))
    torch.testing.assert_close(step.mix(x)[:, :20], x)
    loose, _ = reduced(early=torch.rand(1, 20), tau=-0.1)  # the twin: then everything is a twin of everything
    assert loose.count().tolist() == [1]


def test_the_number_drawn_is_the_number_of_patches_that_do_not_repeat():
    keys = torch.eye(30)
    keys[:12] = keys[0]  # twelve of a kind, each with eleven twins: more than a tenth of 30
    keys[12:15] = keys[12]  # three of a kind, each with two twins: not more
    assert reduced(keys=keys[None])[0].count().tolist() == [18]
    assert reduced(keys=keys[None], min_twins=0.05)[0].count().tolist() == [15]
    assert reduced(keys=keys[None], min_twins=0.4)[0].count().tolist() == [30]


def page(seed: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A page of text with one half blank, cut into four crops, and how much of each is ink."""
    chance = random.Random(seed)
    picture = Image.new("L", (2 * side, 2 * side), 255)
    pen = ImageDraw.Draw(picture)
    for y in range(2, 2 * side - 8, 11):
        line = "".join(chance.choice("abcdefghklmnorstuvwxyzABCDEFGH0123456789 ") for _ in range(chance.randint(10, 40)))
        pen.text((1, y), line, fill=0)
    left, top, right, bottom = [(0, 0, 2, 1), (0, 1, 2, 2), (0, 0, 1, 2), (1, 0, 2, 2)][seed % 4]
    pen.rectangle((left * side, top * side, right * side, bottom * side), fill=255)
    pixels = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
    crops = pixels.unfold(0, side, side).unfold(1, side, side).reshape(4, 1, side, side)
    return crops.expand(-1, 3, -1, -1).contiguous(), (crops[:, 0] < 0).float().mean((1, 2))


def reader() -> CLIPVisionModel:
    """An untrained encoder whose keys show what is in a patch and little of where it is, as in a low block of a trained one."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=84, patch_size=7, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    tower = CLIPVisionModel(config).eval()
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.mul_(0.1)
    return tower


def test_on_rendered_pages_blank_crops_get_fewer_tokens_than_text():
    tower = reader()
    inks, counts, shuffled = [], [], []
    with torch.no_grad(), apply(tower, "token-correlation") as run:
        for seed in range(20):
            crops, ink = page(seed, tower.config.image_size)
            tower(pixel_values=crops)
            count = run.tokens.mask.sum(1) - 1  # without the class token
            assert count[ink == 0].max() < count[ink > 0.02].min()
            inks.append(ink)
            counts.append(count.float())
            shuffled.append(count.float().roll(1))
    assert torch.corrcoef(torch.stack([torch.cat(inks), torch.cat(counts)]))[0, 1] > 0.7
    assert torch.corrcoef(torch.stack([torch.cat(inks), torch.cat(shuffled)]))[0, 1] < 0.6  # the twin: another crop's ink


# -- which ---------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_attention():
    n, draws = 12, 2000
    keys = torch.eye(n)
    keys[:11] = keys[0]  # eleven repeat: one is drawn
    p = torch.arange(1.0, n + 1)
    p = p / p.sum()
    found = torch.zeros(n)
    for seed in range(draws):
        (one,) = kept(reduced(early=p[None], keys=keys[None], seed=seed)[0])
        found[one] += 1
    sigma = (p * (1 - p) / draws).sqrt()
    assert ((found / draws - p).abs() < 3 * sigma).all()
    assert ((found / draws - 1 / n).abs() > 3 * sigma).any()  # the twin: not drawn evenly
    assert kept(reduced(early=p[None], keys=keys[None], sample=False)[0]) == [11]


def test_noise_has_the_mean_and_spread_of_a_gumbel_variable():
    noise = torch.stack([gumbel(1000, seed) for seed in range(50)]).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.02)


def test_draws_are_without_replacement_and_repeat_with_the_seed():
    keys = torch.eye(40)
    keys[:25] = keys[0]
    early = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    first, again, other = (reduced(early=early, keys=keys[None], seed=seed)[0] for seed in (3, 3, 4))
    assert len(set(kept(first))) == 15 and kept(first) == kept(again) != kept(other)


def test_dropped_tokens_join_the_nearest_kept_one():
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8], [0.95, 0.02]]])
    early = torch.tensor([[9.0, 1, 9, 1, 1, 1]])
    late = torch.tensor([[1.0, 2, 1, 3, 1, 1]])
    step, x = reduced(early, late, keys, sample=False, keep=2, iqr=9.0)
    assert kept(step) == [0, 2] and step.assign.tolist() == [[0, 0, 1, 1, 1, 0]]
    torch.testing.assert_close(step.mix(x)[0], torch.stack([x[0, [0, 1, 5]].mean(0), x[0, [2, 3, 4]].mean(0)]))
    weighed, _ = reduced(early, late, keys, sample=False, keep=2, iqr=9.0, merge="attention")
    assert torch.equal(weighed.index, step.index) and torch.equal(weighed.assign, step.assign)
    expected = [(x[0, at] * late[0, at, None]).sum(0) / late[0, at].sum() for at in ([0, 1, 5], [2, 3, 4])]
    torch.testing.assert_close(weighed.mix(x)[0], torch.stack(expected))


# -- crops and budgets -----------------------------------------------------------------------------------------------------


def crops_of(anyres, seed=0):
    """Signals of a thumbnail and four crops, of which the second is blank and the third repeats itself by half."""
    place = anyres(2, 2, 4, 4)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.eye(80)[None].clone()
    keys[0, 32:48] = keys[0, 32]
    keys[0, 48:56] = keys[0, 48]
    return place, torch.rand(1, 80, generator=generator), torch.rand(1, 80, generator=generator) * 0.1 + 1, keys


def per_unit(step, place):
    return torch.bincount(place.unit[0][kept(step)], minlength=place.units).tolist()


def test_crops_keep_by_their_density_and_the_thumbnail_stays_whole(anyres):
    place, early, late, keys = crops_of(anyres)
    step, x = reduced(early, late, keys, place)
    assert per_unit(step, place) == [16, 16, 1, 8, 16]
    assert torch.equal(step.mix(x)[:, :16], x[:, :16])
    unit = torch.arange(5).repeat_interleave(16)[None]
    one = torch.ones_like(unit)
    frames = Place(unit, place.row, place.col, 4 * one, 4 * one, 5, 0 * one, 0 * one, one, one)
    keys[0, :16] = keys[0, 0]
    assert per_unit(reduced(early, late, keys, place)[0], place) == [16, 16, 1, 8, 16]
    assert per_unit(reduced(early, late, keys, frames)[0], frames) == [1, 16, 1, 8, 16]  # the twin: no frame is a thumbnail


def test_dropped_tokens_stay_within_their_crop(anyres):
    place, early, late, keys = crops_of(anyres)
    step, _ = reduced(early, late, keys, place)
    into = step.index.gather(1, step.assign)
    assert torch.equal(place.unit.gather(1, into), place.unit)


@pytest.mark.parametrize("keep", [1, 3, 20, 57, 79, 0.1, 0.5])
def test_a_budget_is_met_exactly_and_shared_by_density(anyres, keep):
    place, early, late, keys = crops_of(anyres)
    step, _ = reduced(early, late, keys, place, keep=keep)
    assert len(kept(step)) == get("token-correlation", keep=keep).promise(80).count and step.mask is None
    counts = per_unit(step, place)
    assert counts[2] <= counts[3] <= counts[1]


def test_the_papers_own_count_as_a_budget_keeps_the_same_tokens(anyres):
    place, early, late, keys = crops_of(anyres)
    late[0, 50] = 9.0
    free, _ = reduced(early, late, keys, place)
    told, _ = reduced(early, late, keys, place, keep=int(free.count()))
    assert kept(free) == kept(told) and 50 in kept(free)
    assert not get("token-correlation").promise(80).exact and get("token-correlation", keep=9).promise(80).exact


def test_rows_of_different_kinds_are_reduced_as_they_are_alone(anyres):
    many, few = anyres(2, 2, 4, 4), anyres(1, 2, 4, 4)
    fields = {}
    for name in ("unit", "row", "col", "height", "width", "crop_row", "crop_col", "crop_rows", "crop_cols"):
        rows = torch.full((3, 80), -1)
        rows[0], rows[1, :48] = getattr(many, name)[0], getattr(few, name)[0]
        rows[2, :16] = 1 if name in ("crop_rows", "crop_cols") else getattr(many, name)[0, :16]
        fields[name] = rows
    mask, place = fields["unit"] >= 0, Place(**fields, units=5)
    generator = torch.Generator().manual_seed(0)
    early, late, keys = (torch.rand(3, 80, *shape, generator=generator) for shape in ((), (), (3,)))
    keys[~mask] = 1e4
    for extra in ({}, {"keep": 0.3}, {"keep": 0.3, "merge": "attention"}):
        batch, x = reduced(early, late, keys - 0.5, place, mask, **extra, tau=0.9)
        for b, own in enumerate((many, few, Place.grid(1, 4, 4))):
            n = int(mask[b].sum())
            one, _ = reduced(
                early[b : b + 1, :n], late[b : b + 1, :n], keys[b : b + 1, :n] - 0.5, own, x=x[b : b + 1, :n], **extra, tau=0.9
            )
            assert kept(batch, b) == kept(one)
            alone = one.mix(x[b : b + 1, :n])[0][one.real[0]]
            torch.testing.assert_close(batch.mix(x)[b][batch.real[b]], alone)


@pytest.mark.parametrize("fields", [{"keep": 0}, {"keep": 1.5}, {"merge": "sum"}, {"min_twins": 2}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError):
        get("token-correlation", **fields)


def test_free_counts_go_through_a_model_alone_as_in_a_batch():
    net = tiny.model("LlavaNextForConditionalGeneration")
    chosen = tiny.samples(net)
    with apply(net, "token-correlation", tau=0.9) as run:
        batch = tiny.run(net, tiny.prompts(net, chosen))
        images = run.report().images
        assert all(0 < image.after < image.before for image in images)
        assert len({image.after / image.before for image in images}) > 1  # it is the content that decides
        for b, sample in enumerate(chosen):
            alone = tiny.run(net, tiny.prompts(net, [sample]))
            torch.testing.assert_close(batch[b, -1], alone[0, -1], atol=1e-4, rtol=1e-4)


def test_free_counts_need_no_look_at_values():
    place = Place.grid(2, 6, 6, "meta")
    signals = {name: torch.rand(2, 36, device="meta") for name in ("early", "late")}
    signals["keys"] = torch.rand(2, 36, 4, device="meta")
    step = get("token-correlation").reduce(Tokens(torch.rand(2, 36, 4, device="meta"), place=place), signals)
    assert step.k == 36 and step.mask is not None
