"""Bridges in LLaVA-NeXT: each crop's tokens are stitched, cut to the picture and given newlines as its patches were."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaNextImageProcessor, LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import jeton
import tiny
from jeton import bridge
from jeton.bridge import m3, shorten
from jeton.engine import apply, watch
from jeton.ops.squares import pool

SIZES = [(40, 46), (20, 47), (48, 25), (16, 70), (70, 16), (24, 24), (9, 31)]


def test_all_tokens_are_the_model_as_it_was_bit_for_bit():
    plain = tiny.tiny_llava_next()
    inputs = tiny.prompts(plain)
    before = tiny.run(plain, inputs)
    assert torch.equal(tiny.run(bridge.attach(plain, "m3"), inputs), before)


@pytest.mark.parametrize("tokens", [36, 9, 4, 1])
def test_pooled_crops_are_packed_as_a_model_of_larger_patches_packs_its_own(tokens):
    plain = tiny.tiny_llava_next()
    model = bridge.attach(plain, "m3", tokens=tokens)
    counts = [image_size_to_num_patches(size, plain.config.image_grid_pinpoints, 24) for size in SIZES]
    crops, sizes = [torch.randn(n, tokens, 64) for n in counts], torch.tensor(SIZES)
    larger = copy.deepcopy(plain.config)
    larger.vision_config.patch_size = 24 // int(tokens**0.5)
    plain.model.config = larger
    newline = model.model.image_newline
    own, lengths = LlavaNextModel.pack_image_features(plain.model, crops, sizes, "default", newline)
    found, made = model.model.pack_image_features(crops, sizes, "default", newline)
    assert made.tolist() == lengths.tolist() and all(torch.equal(a, b) for a, b in zip(found, own, strict=True))


@pytest.mark.parametrize("tokens", [36, 9, 4, 1])
def test_processor_geometry_and_model_agree_on_every_shape(tokens):
    model = bridge.attach(tiny.tiny_llava_next(), "m3", tokens=tokens)
    side = {"height": 24, "width": 24}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size=side, image_grid_pinpoints=model.config.image_grid_pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor=images, tokenizer=jeton.load_demo().processor.tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    fitted = bridge.fit(processor, model)
    for size in SIZES:
        inputs = {"pixel_values": torch.zeros(1, 5, 3, 24, 24), "image_sizes": torch.tensor([size])}
        (made,) = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        with watch(model) as run:
            (geometry,) = run.view.geometry(inputs, "image")
        assert len(made) == len(geometry) == fitted._get_number_of_features(*size, 24, 24) - 1, size
        patches = geometry.source[geometry.unit >= 0]
        assert patches.shape[1] == 36 // tokens and len(patches.unique()) == patches.numel() and patches.max() < geometry.patches


def test_a_token_lies_where_the_patches_stand_that_make_it():
    """Of a crop that is not 0 only at one patch, one token of the window around it hears anything."""
    model = bridge.attach(tiny.tiny_llava_next(), "m3", tokens=9)
    with watch(model) as run:
        (geometry,) = run.view.geometry({"image_sizes": torch.tensor([[48, 48]])}, "image")
    pick = torch.zeros(5 * 36, 32)
    pick[3 * 36 + 2 * 6 + 5] = 1  # third crop (unit 3), row 2, column 5
    crops = pool(pick.view(5, 36, 32), 9)
    (packed,), _ = model.model.pack_image_features([crops], torch.tensor([[48, 48]]), image_newline=torch.zeros(32))
    (token,) = packed.sum(1).nonzero().flatten().tolist()
    assert 3 * 36 + 2 * 6 + 5 in geometry.source[token] and int(geometry.unit[token]) == 3
    assert (int(geometry.row[token]), int(geometry.col[token])) == (1, 2)


def test_the_loss_is_the_mean_of_the_losses_at_every_scale():
    model = bridge.attach(tiny.tiny_llava_next(), "m3")
    inputs = tiny.prompts(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < tiny.WORDS, -100)
    found = m3.loss(model, {**inputs, "labels": labels}, (36, 9, 1), (2, 1, 1))
    whole = [len(each) for each in _encoded(model, inputs)]
    for tokens, share in ((36, 0.5), (9, 0.25), (1, 0.25)):
        model.bridge.scale(tokens)
        short = shorten({**inputs, "labels": labels}, tiny.IMAGE, whole, [len(each) for each in _encoded(model, inputs)])
        torch.testing.assert_close(found[f"{tokens} tokens"], model(**short).loss * share)
    with pytest.raises(ValueError, match="a share for each of 2 scales"):
        m3.loss(model, inputs, (36, 9), (1,))


def _encoded(model, inputs):
    return model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output


@pytest.mark.parametrize(("name", "options"), [("m3", {"tokens": 4}), ("tokenpacker", {"scale": 2, "heads": 2})])
def test_it_generates_is_reduced_saved_and_brought_back(name, options, tmp_path):
    model = bridge.attach(tiny.tiny_llava_next(), name, **options)
    inputs = tiny.prompts(model)
    before = tiny.run(model, inputs)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is bridge.BridgedLlavaNext and torch.equal(tiny.run(again, inputs), before)
    with apply(again, "divprune", keep=0.5) as run, torch.no_grad():
        assert again.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > 0
        report = run.report()
    assert all(image.after < image.before for image in report.images) and report.flops < report.flops_full


def test_bridges_without_a_grid_for_every_crop_are_refused():
    with pytest.raises(jeton.Unsupported, match="llava-mini does not make a square grid"):
        bridge.attach(tiny.tiny_llava_next(), "llava-mini")
