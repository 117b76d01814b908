"""Every bridge: attached to a real LLaVA, saved and brought back by the Auto classes, generating, trained, measured."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import jeton
import tiny
from jeton import bridge
from jeton.bridge import shorten
from jeton.demo import prompt
from jeton.measure.compare import compare
from jeton.recipes._demo import scenes
from jeton.train import Recipe, train

OPTIONS = {
    "m3": {"tokens": 16},
    "tokenpacker": {"scale": 2, "layers": [1, 2, 3, 4]},
    "llava-mini": {"side": 1, "fusion_layers": 2},
    "simvlg": {"merge": 8, "depth": 3, "width": 32, "heads": 4, "mlp": 48},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)


def attached(name, seed=0, **more):
    model = bridge.attach(tiny.tiny_llava(side=8), name, **{**OPTIONS[name], **more})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.bridge.named_parameters():
            if "norm" not in key:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def test_every_registered_bridge_is_tested_here():
    assert set(OPTIONS) == {card.id for card in jeton.systems("bridge")}


@EVERY
def test_saved_and_brought_back_by_the_auto_classes(name, tmp_path):
    demo = jeton.load_demo()
    options = {"m3": {"tokens": 36}, "tokenpacker": {"scale": 3}, "llava-mini": {"side": 2}, "simvlg": OPTIONS["simvlg"]}[name]
    model = bridge.attach(demo.model, name, **options).eval()
    model.save_pretrained(tmp_path)
    bridge.fit(demo.processor, model).save_pretrained(tmp_path)
    again, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is bridge.BridgedLlava and again.bridge.tokens == model.bridge.tokens
    shown = demo.examples[:3]
    words = [prompt(each.question) for each in shown]
    inputs = processor(images=[each.image for each in shown], text=words, padding=True, return_tensors="pt")
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == model.bridge.tokens).all()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@EVERY
def test_a_prompt_gives_the_same_alone_as_in_a_padded_batch(name):
    model = attached(name)
    whole = tiny.prompts(model)
    logits = tiny.run(model, whole)[:, -1]
    for row, sample in enumerate(tiny.samples(model)):
        alone = tiny.run(model, tiny.prompts(model, [sample]))[0, -1]
        torch.testing.assert_close(logits[row], alone, atol=2e-4, rtol=2e-4)


@EVERY
def test_generating_with_a_cache_is_recomputing(name):
    """The prompt stays what it was, fused once; what is decoded stays raw."""
    model, asked = attached(name), tiny.prompts(attached(name))
    said = model.generate(**asked, max_new_tokens=4, do_sample=False)
    length = asked["input_ids"].shape[1]
    mask = torch.nn.functional.pad(asked["attention_mask"], (0, 4), value=1)
    labels = torch.where(torch.arange(length + 4) < length, -100, said)  # what was said is no instruction
    with torch.no_grad():
        logits = model(**{**asked, "input_ids": said, "attention_mask": mask}, labels=labels).logits
    assert torch.equal(logits[:, length - 1 : -1].argmax(-1), said[:, length:])


@EVERY
def test_beams_of_a_batch_are_those_of_each_prompt(name):
    model = attached(name)
    samples = tiny.samples(model)
    more = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    together = model.generate(**tiny.prompts(model), **more)[:, -3:]
    for row, sample in enumerate(samples):
        assert torch.equal(together[row], model.generate(**tiny.prompts(model, [sample]), **more)[0, -3:])


@EVERY
def test_gradients_reach_all_of_the_bridge(name):
    model = attached(name).train()
    inputs = tiny.prompts(model)
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) < inputs["input_ids"].shape[1] - 2, -100, inputs["input_ids"])
    model(**inputs, labels=labels).loss.backward()
    silent = [key for key, weight in model.bridge.named_parameters() if weight.grad is None or not weight.grad.abs().sum()]
    assert silent == []


@EVERY
def test_half_precision_stays_finite(name):
    model = attached(name).to(torch.bfloat16)
    assert tiny.run(model, tiny.cast(tiny.prompts(model), torch.bfloat16)).isfinite().all()


@EVERY
def test_encoder_and_language_model_are_not_copied(name):
    plain = tiny.tiny_llava(side=8)
    model = bridge.attach(plain, name, **OPTIONS[name])
    assert model.model.vision_tower is plain.model.vision_tower and model.lm_head is plain.lm_head
    if hasattr(model.bridge, "projector"):
        assert torch.equal(model.bridge.projector.linear_1.weight, plain.model.multi_modal_projector.linear_1.weight)


def test_methods_are_applied_to_a_bridged_model_as_to_any():
    model = attached("m3")
    with jeton.apply(model, "divprune", keep=4) as run:
        tiny.run(model, tiny.prompts(model))
        report = run.report()
    assert {(image.before, image.after) for image in report.images} == {(16, 4)}


def test_the_bridge_is_part_of_what_a_report_counts():
    flops = {}
    for layers in (1, 2):
        model = attached("llava-mini", fusion_layers=layers)
        with jeton.apply(model, "divprune", keep=1) as run:
            tiny.run(model, tiny.prompts(model, tiny.one_image(model)))
            flops[layers] = run.report().flops_full
    length = tiny.prompts(model, tiny.one_image(model))["input_ids"].shape[1]
    rows, width, kv, mlp = 64 + 1 + length, 64, 32, 80
    one = 4 * rows * width * width + 4 * rows * width * kv + 4 * rows * rows * width + 6 * rows * width * mlp
    assert flops[2] - flops[1] == one


def test_compare_works_on_a_bridged_model(tmp_path):
    demo = jeton.load_demo()
    model = bridge.attach(demo.model, "m3", tokens=36)
    model.save_pretrained(tmp_path)
    bridge.fit(demo.processor, model).save_pretrained(tmp_path)
    found = compare(str(tmp_path), methods=["divprune"], keep=[9], limit=4, batch_size=4, controls=False, progress=False)
    assert [row.kept for row in found.rows] == [36, 9] and all(row.reason is None for row in found.rows)


def test_trained_bridges_stand_beside_the_methods(tmp_path):
    demo = jeton.load_demo()
    model = bridge.attach(demo.model, "m3", tokens=36)
    model.save_pretrained(tmp_path)
    bridge.fit(demo.processor, model).save_pretrained(tmp_path)
    more = {"limit": 4, "batch_size": 4, "controls": False, "pictures": 1, "progress": False}
    found = compare(methods=["divprune"], keep=[0.25], bridges=[tmp_path], **more)
    full, pruned, bridged = found.rows
    assert (bridged.method, bridged.spec, bridged.keep, bridged.kept, bridged.fraction) == (
        "bridge m3",
        "bridge m3",
        0.25,
        36,
        0.25,
    )
    assert full.fraction == 1 and pruned.fraction == 0.25 and 0 < bridged.flops < full.flops and "bridge m3" in str(found)
    with pytest.raises(ValueError, match="has no bridge"):
        compare(methods=["divprune"], keep=[36], bridges=[demo.path], **more)


def test_shortening_a_batch_cuts_placeholders_and_nothing_else():
    ids = torch.tensor([[1, 7, 7, 7, 7, 5, 6], [1, 7, 7, 7, 7, 8, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids != 6, -100)}
    short = shorten(inputs, 7, 4, 1)
    assert short["input_ids"].tolist() == [[1, 7, 5, 6], [1, 7, 8, 0]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert short["labels"].tolist() == [[-100, -100, -100, 6], [-100] * 4]
    ragged = {"input_ids": torch.tensor([[1, 7, 7, 7, 7], [1, 7, 7, 5, 6]])}  # two images, and one
    short = shorten(ragged, 7, 2, 1)
    assert short["input_ids"].tolist() == [[0, 1, 7, 7], [1, 7, 5, 6]] and short["attention_mask"].tolist() == [
        [0, 1, 1, 1],
        [1] * 4,
    ]
    short = shorten({**ragged, "labels": ragged["input_ids"].clone()}, 7, 2, 1)
    assert short["labels"].tolist() == [[-100, 1, 7, 7], [1, 7, 5, 6]]  # nothing is learned where a row was padded


WRONG = {
    "unknown": (("tokenpackr", {}), "Did you mean tokenpacker"),
    "no bridge": (("divprune", {}), "is no bridge"),
    "option": (("m3", {"token": 4}), "Did you mean tokens"),
    "not square": (("m3", {"tokens": 9}), r"choose one of \[64, 16, 4, 1\]"),
    "scale": (("tokenpacker", {"scale": 3}), "divides the grid's side 8"),
    "layers": (("tokenpacker", {"layers": [9]}), "encoder of 5 blocks"),
    "side": (("llava-mini", {"side": 0}), "at least 1"),
    "merge": (("simvlg", {"merge": 19, "depth": 4, "width": 32, "heads": 4}), "use merge=12 or fewer"),
}


@pytest.mark.parametrize(("asked", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_refused_with_a_sentence(asked, words):
    with pytest.raises(ValueError, match=words):
        bridge.attach(tiny.tiny_llava(side=8), asked[0], **asked[1])


def test_other_families_are_refused():
    with pytest.raises(jeton.Unsupported, match="not of a LlavaOnevision"):
        bridge.attach(tiny.tiny_llava_onevision(), "m3")
    with pytest.raises(jeton.Unsupported, match=r"LlavaForConditionalGeneration or .*, not of a BridgedLlava"):
        bridge.attach(attached("m3"), "tokenpacker")


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    """Through the one trainer, with embeddings tied to the head, as the recipes do."""

    def taught(folder, stop=None, resume=False):
        demo = jeton.load_demo()
        model = bridge.attach(demo.model, "m3", tokens=1)
        steps = []

        def loss(model, batch):
            steps.append(1)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return model(**batch).loss

        told = Recipe(steps=4, rate=1e-3)
        train(model, scenes(demo.processor, 2, 1), loss, told, out=folder, resume=resume, save_every=2, progress=False)
        return model

    whole = taught(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path / "parts", stop=4)
    resumed = taught(tmp_path / "parts", resume=True)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value) and torch.equal(again.state_dict()[name], value), name
