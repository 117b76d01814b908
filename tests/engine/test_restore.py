"""Methods that merge inside an encoder whose patches are mixed behind it: every patch is there again before that."""

from __future__ import annotations

import pytest
import torch

import clips
import tiny
from jeton import Unsupported, bridge
from jeton.engine import apply
from jeton.method import get

ONEVISION, LLAVA = "LlavaOnevisionForConditionalGeneration", "LlavaForConditionalGeneration"
MERGING = ["tome(keep=0.4)", "pitome(keep=0.4)", "dymu(keep=0.4)", "dymu(thresholds=(0.2, 0.2, 0.2, 0.2, 0.2))"]


def encoded(net, inputs):
    """What the vision tower hands on in a run, (pictures, patches, D)."""
    found = []
    handle = net.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    try:
        logits = tiny.run(net, inputs)
    finally:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("spec", MERGING)
def test_a_mixing_model_sees_what_its_encoder_alone_would_restore(spec):
    """Crops of two sizes and a video in one batch: every picture's patches are those of the tower run alone, restored by hand;
    projector, resizing, packing and language model run whole on them."""
    net = tiny.model(ONEVISION)
    inputs = tiny.inputs_for(net)
    pictures, plain = encoded(net, inputs)
    with apply(net, spec, restore=True) as run:
        restored, logits = encoded(net, inputs)
        report = run.report()
    tower, at = net.model.vision_tower, 0
    pixels = [inputs["pixel_values"].flatten(0, 1), inputs["pixel_values_videos"].flatten(0, 1)]
    for number, (whole, after) in enumerate(zip(pictures, restored, strict=True)):
        shown = pixels[number][pixels[number].flatten(1).any(1)]
        assert after.shape == whole.shape and len(shown) == len(after)
        with apply(tower, spec) as alone, torch.no_grad():
            features = tower(shown, output_hidden_states=True).hidden_states[net.config.vision_feature_layer]
            by_hand = features.gather(1, alone.reduction.assign[..., None].expand(-1, -1, features.shape[-1]))
        assert (after - by_hand).abs().max() < 1e-5 and (after - whole).abs().max() > 0.01
        assert len(after[0].unique(dim=0)) < whole.shape[1]
        at += 1
    assert at == 2 and not torch.equal(plain, logits)
    assert [image.after for image in report.images] == [image.before for image in report.images]
    assert report.encoder_tokens[-1] < report.encoder_tokens[0] and report.flops < report.flops_full
    assert torch.equal(tiny.run(net, inputs), plain)  # nothing remains


def test_nothing_merged_changes_no_bit():
    net = tiny.model(ONEVISION)
    inputs = tiny.inputs_for(net)
    with apply(net, "dymu", thresholds=(1.0,) * 5, restore=True):
        assert torch.equal(tiny.run(net, inputs), tiny.run(net, inputs))
        merged_nothing = tiny.run(net, inputs)
    assert torch.equal(merged_nothing, tiny.run(net, inputs))


@pytest.mark.parametrize(
    "name",
    [
        "LlavaNextVideoForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Ovis2ForConditionalGeneration",
        "BridgedLlava",
        "BridgedLlavaNext",
    ],
)
def test_every_family_that_mixes_patches_takes_it(name):
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    plain = tiny.run(net, inputs)
    with apply(net, "dymu", thresholds=(1.0,) * 12, restore=True):
        torch.testing.assert_close(tiny.run(net, inputs), plain, atol=1e-4, rtol=1e-4)
    with apply(net, "tome", keep=0.5, restore=True) as run:
        merged = tiny.run(net, inputs)
        report = run.report()
    assert merged.isfinite().all() and not torch.equal(merged, plain)
    assert report.flops < report.flops_full and all(image.after == image.before for image in report.images)


def test_features_of_several_blocks_cannot_be_restored_at_one():
    model = bridge.attach(tiny.tiny_llava(side=8), "tokenpacker", heads=2)
    with pytest.raises(Unsupported, match="several encoder blocks"):
        apply(model, "tome", keep=0.5, restore=True)


def test_methods_behind_act_on_what_was_restored_and_generate_goes_on():
    net = tiny.model(ONEVISION)
    inputs = tiny.inputs_for(net)
    with apply(net, "dymu(keep=0.4) | fastervlm(keep=0.5, score='received')", restore=True) as run, torch.no_grad():
        ids = net.generate(**inputs, max_new_tokens=4, do_sample=False)
        images = run.report().images
    assert ids.shape[1] > 0 and all(image.after < image.before for image in images)


def test_signals_of_restored_patches_are_those_of_the_tokens_they_went_to():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, "tome(keep=9) | fastervlm(keep=20)", restore=True) as run:
        tiny.run(net, inputs)
        flat = run.site.flat(next(iter(run.site.records)))
        first = run.site.history[0][1]
        features = encoded(net, inputs)[0][0]
    together = first.assign[0, 1:][:, None] == first.assign[0, 1:]
    per = flat.unflatten(0, (-1, together.shape[0]))[0]
    assert together.sum() > together.shape[0]  # some patches went together
    for a, b in together.nonzero().tolist():
        assert torch.equal(per[a], per[b]) and features.shape[1] == 20


def test_an_encoder_alone_hands_on_dense_features():
    net = tiny.model("CLIPVisionModel")
    pictures = tiny.pictures(net)
    with apply(net, "tome", keep=9) as run, torch.no_grad():
        short = net(**pictures).last_hidden_state
        assign = run.reduction.assign
    with apply(net, "tome", keep=9, restore=True), torch.no_grad():
        dense = net(**pictures).last_hidden_state
    assert short.shape[1] == 10 and dense.shape[1] == assign.shape[1]
    assert torch.equal(dense, short.gather(1, assign[..., None].expand(-1, -1, short.shape[-1])))


@pytest.mark.parametrize("name", ["evit(keep=0.5, fuse=False, score='received')", "flowcut(keep=0.5)"])
def test_dropped_patches_cannot_be_restored(name):
    net = tiny.model(ONEVISION if "flowcut" not in name else LLAVA)
    inputs = tiny.inputs_for(net)
    with pytest.raises(Unsupported, match=r"drops patches inside the encoder.*tome"), apply(net, name, restore=True):
        tiny.run(net, inputs)


def test_without_it_the_refusal_says_what_works():
    video = clips.moving_digit(4, 8 * tiny.PATCH, 8 * tiny.PATCH)
    with pytest.raises(Unsupported, match=r"mixes neighbouring.*restore=True.*divprune"):
        apply(tiny.model(ONEVISION), "dymu")
    qwen = tiny.model("Qwen2_5_VLForConditionalGeneration")
    for restore in (False, True):  # a tower that packs all pictures cannot lose patches one by one
        with pytest.raises(Unsupported, match=r"mixes neighbouring.*use divprune, fastv"):
            apply(qwen, "dymu", restore=restore)
    inputs = clips.prompts([video])
    for named in ("divprune(keep=0.5)", "fastv(keep=0.5)", "fastervlm(score='received', keep=0.5)"):
        with apply(qwen, get(named)) as run:
            tiny.run(qwen, inputs)
            assert all(image.after < image.before for image in run.report().images)
