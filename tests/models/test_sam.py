"""SAM's vision encoder: windows of the map there is, against the model's own layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import adaptive_avg_pool2d

import jeton
import tiny
import tiny_encoders
from jeton.method import Unsupported
from jeton.place import Place
from jeton.tokens import Tokens

PATCH = tiny.PATCH


def pictures(side, batch=2):
    return torch.randn(batch, 3, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(0))


def clustered(window, rows, cols, tau, near=2):
    """One window (H, W, D) to its centres (rows, cols, D), one picture at a time; and its patches as they are made of these."""
    height, width, d = window.shape
    z = window.reshape(-1, d)
    centres = adaptive_avg_pool2d(window.permute(2, 0, 1)[None], (rows, cols))[0].permute(1, 2, 0).reshape(-1, d)
    cell = [(y * rows // height, x * cols // width) for y in range(height) for x in range(width)]
    far = torch.tensor([[abs(a - i) > near or abs(b - j) > near for a, b in cell] for i in range(rows) for j in range(cols)])
    for _ in range(5):
        share = (-tau * torch.cdist(centres, z) ** 2).masked_fill(far, -torch.inf).softmax(0)
        centres = share @ z / share.sum(1, keepdim=True)
    weight = (-tau * torch.cdist(z, centres) ** 2).exp()
    return centres.view(rows, cols, d), weight / weight.sum(1, keepdim=True)


def by_hand(model, pixels, tau, window, small, sides, smalls, adapt=True):
    """Block 0, clusters window by window, blocks 1 to 3 on the smaller map with windows of `small`, the map again, block 4."""
    outputs = []
    starts = [sum(sides[:i]) for i in range(len(sides))]
    for picture in pixels:
        x = model.layers[0](model.patch_embed(picture[None]) + model.pos_embed)[0]
        made = [
            [clustered(x[t : t + a, s : s + b], i, j, tau) for s, b, j in zip(starts, sides, smalls, strict=True)]
            for t, a, i in zip(starts, sides, smalls, strict=True)
        ]
        few = torch.cat([torch.cat([centres for centres, _ in row], 1) for row in made], 0)[None]
        for layer in list(model.layers)[1:4]:
            own = layer.window_size
            layer.window_size = small if own and adapt else own
            few = layer(few)
            layer.window_size = own
        parts, at = few[0].split(smalls, 0), []
        for band, row in zip(parts, made, strict=True):
            cells = band.split(smalls, 1)
            at.append([(back @ c.flatten(0, 1)) for c, (_, back) in zip(cells, row, strict=True)])
        rows = [
            torch.cat([w.view(a, b, -1) for w, b in zip(row, sides, strict=True)], 1) for a, row in zip(sides, at, strict=True)
        ]
        outputs.append(model.neck(model.layers[4](torch.cat(rows, 0)[None]))[0])
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize(("attention", "keep"), [("sdpa", 25 / 49), ("eager", 25 / 49), ("sdpa", 4 / 9)])
def test_windows_are_clustered_one_by_one_and_laid_over_the_smaller_map(attention, keep):
    """Windows of 3 on 7 x 7 patches: 3, 3 and 1, of which 2, 2 and 1 clusters are left."""
    model = tiny.model("SamVisionEncoder", attention)
    pixels = pictures(7)
    with jeton.apply(model, "elvit", keep=keep, after=0, until=3, tau=0.02) as run:
        got = model(pixels).last_hidden_state
        report = run.report()
        assert [len(run.assignment(1, block)[0].unique()) for block in range(5)] == [25, 25, 25, 49, 49]
        assert run.tokens.features.shape == (2, 49, 16) and run.picture(1).size[0] == 336
    expected = by_hand(model, pixels, 0.02, 3, 2, [3, 3, 1], [2, 2, 1])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    twin = by_hand(model, pixels, 0.02, 3, 2, [3, 3, 1], [2, 2, 1], adapt=False)  # windows as large as before
    assert (got - twin).abs().max() > 0.05
    assert report.encoder_tokens == (49.0, 25.0, 25.0, 25.0, 49.0) and [image.after for image in report.images] == [49, 49]
    assert report.flops_share < 0.8


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 3, 7])
def test_as_many_clusters_as_patches_change_nothing(window):
    model = tiny_encoders.tiny_sam(window=window)
    pixels = pictures(7)
    whole = model(pixels).last_hidden_state
    with jeton.apply(model, "elvit", keep=48, tau=100.0) as run:  # of one window all patches, of the whole map one row less
        same = model(pixels).last_hidden_state
        assert same.shape == whole.shape and run.report().flops_share <= 1
    assert torch.equal(same, whole) == (window == 3)
    with jeton.apply(model, "elvit", keep=20, tau=100.0):
        assert (model(pixels).last_hidden_state - whole).abs().max() > 1e-2


def test_the_published_map():
    """64 x 64 patches in windows of 14, padded to 70: 10 x 10 clusters in each, 6 in what is left at the borders."""
    place = Place.grid(1, 64, 64)
    x = torch.randn(1, 4096, 2, generator=torch.Generator().manual_seed(0))
    x[..., 1] = (place.row // 14 * 5 + place.col // 14).float()  # which window
    whole = Tokens(x, place=Place(**{**vars(place), "window": 14}))
    for step in (jeton.get("elvit").reduce(whole), jeton.get("elvit").steps(4096, 32)[5].reduce(whole)):
        assert step.lattice == (46, 46, 10) and step.k == 46 * 46
        assert (step.index.diff() > 0).all() and torch.equal(step.assign.gather(1, step.index)[0], torch.arange(46 * 46))
    after = step.apply(whole)
    window = lambda at, side: at // 46 // side * 5 + at % 46 // side  # noqa: E731
    torch.testing.assert_close(after.features[0, :, 1], window(torch.arange(46 * 46), 10).float())  # no window has of another
    torch.testing.assert_close(step.restore(after).features[..., 1], x[..., 1])
    torch.testing.assert_close(after.size.sum(), torch.tensor(4096.0))


def test_inside_sam_and_in_the_model_around_it():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.SamVisionConfig(**sizes, image_size=28, patch_size=4, window_size=3, global_attn_indexes=[1])
    model = transformers.SamVisionModel(config).eval()
    with torch.no_grad(), jeton.apply(model, "elvit", keep=0.5, after=0) as run:
        assert model(pictures(7)).last_hidden_state.shape == (2, 256, 7, 7)
        assert run.report().encoder_tokens[1] < 49


@pytest.mark.parametrize("method", ["tome", "fastervlm", "divprune", "downsample", "tomesd"])
def test_what_leaves_no_map_is_refused(method):
    with pytest.raises(Unsupported, match=rf"{method} cannot be applied: SamVisionEncoder runs its blocks on maps.*use elvit"):
        jeton.apply(tiny.model("SamVisionEncoder"), method)


def test_swin_says_why_nothing_can_leave():
    config = transformers.SwinConfig(image_size=32, depths=[1, 1], num_heads=[1, 1], embed_dim=16)
    with pytest.raises(Unsupported, match=r"SwinModel halves its map from stage to stage.*STSwin"):
        jeton.apply(transformers.SwinModel(config), "elvit")
