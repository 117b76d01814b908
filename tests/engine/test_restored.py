"""A dense map after tokens have merged inside an encoder."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny


@torch.no_grad()
@pytest.mark.parametrize("spec", ["tome(r=5)", "mctf(r=5)", "pitome(keep=20)", "tome(r=3) | elvit(keep=0.5)"])
def test_every_patch_has_what_its_group_has(spec):
    model = tiny.model("ViTModel")
    with jeton.apply(model, spec) as run:
        out = model(**tiny.inputs_for(model)).last_hidden_state
        dense, reduction = run.restored, run.reduction
    assert dense.features.shape == (3, 50, 32) and bool(dense.mask.all()) and out.shape[1] < 50
    torch.testing.assert_close(dense.features[:, 0], out[:, 0])  # special tokens stand in front as ever
    for picture in range(3):
        torch.testing.assert_close(dense.features[picture], out[picture, reduction.assign[picture]])
    assert torch.equal(dense.place.row[:, 1:].unflatten(1, (7, 7))[0, :, 0], torch.arange(7))


@torch.no_grad()
def test_what_was_dropped_is_masked():
    model = tiny.model("ViTModel")
    with jeton.apply(model, "evit", ratio=0.5, fuse=False) as run:
        model(**tiny.inputs_for(model))
        dense, left = run.restored, len(run.tokens)
    assert (dense.mask.sum(1) == left).all() and not dense.features[~dense.mask].any()


@torch.no_grad()
def test_with_all_tokens_there_they_are_the_map():
    model = tiny.model("ViTModel")
    for spec in ("tomesd", "elvit"):
        with jeton.apply(model, spec) as run:
            out = model(**tiny.inputs_for(model)).last_hidden_state
            assert torch.equal(run.restored.features, out)
    with jeton.apply(model, "tome(r=5) | fastervlm(keep=6)") as run:
        model(**tiny.inputs_for(model))
        with pytest.raises(ValueError, match="cannot be undone"):
            _ = run.restored


@torch.no_grad()
def test_padding_stays_padding():
    model = tiny.model("Siglip2VisionModel")
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "tome(r=4)") as run:
        model(**inputs)
        assert torch.equal(run.restored.mask.sum(1), torch.tensor([image.before for image in run.report().images]))


@torch.no_grad()
def test_what_is_restored_on_the_way_is_padded_as_before():
    model = tiny.model("Siglip2VisionModel")
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "tome(keep=0.4)", restore=True) as run:
        model(**inputs)
        assert torch.equal(run.tokens.real, inputs["pixel_attention_mask"].bool())
