"""LLaVA-Mini: lengths, what answers and padding may and may not change, plain LLaVA as its limit, and what the fusion is for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from PIL import Image

import jeton
import tiny
import toy
from jeton import bridge
from jeton.bridge.llava_mini import tiles


def mini(seed=0, **options):
    model = bridge.attach(tiny.tiny_llava(side=8), "llava-mini", **{"side": 1, "fusion_layers": 2, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.bridge.named_parameters():
            if "norm" not in name and "projector" not in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@contextmanager
def watched(module):
    """What a module is called with, one entry a call."""
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


@torch.no_grad()
def entering(model, inputs, labels=None):
    """(B, L, d) what enters the language model."""
    with watched(model.model.language_model) as calls:
        model(**inputs, labels=labels)
    return calls[0]["inputs_embeds"]


def raw(model, inputs):
    return model.get_input_embeddings()(inputs["input_ids"])


def visual(model, inputs):
    return inputs["input_ids"] == model.config.image_token_id


@pytest.mark.parametrize("side", [1, 2, 3])
def test_text_keeps_its_length_and_an_image_has_so_many_tokens(side):
    model = mini(side=side)
    inputs = tiny.prompts(model)
    embeds = entering(model, inputs)
    assert embeds.shape == (*inputs["input_ids"].shape, 64) and model.bridge.tokens == side**2
    real = inputs["attention_mask"].bool()
    changed = (embeds != raw(model, inputs)).any(-1)
    assert torch.equal(changed, real)


def two_turns(model):
    """A prompt, an answer of three tokens, another question and another answer."""
    inputs = tiny.prompts(model, tiny.one_image(model))
    ids = torch.cat([inputs["input_ids"], tiny.words(3, 50), tiny.words(4, 51), tiny.words(3, 52)], 1)
    labels = torch.full_like(ids, -100)
    for answer in (slice(-10, -7), slice(-3, None)):
        labels[:, answer] = ids[:, answer]
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def test_answers_change_neither_instructions_nor_visual_tokens():
    model = mini()
    inputs, labels = two_turns(model)
    other = {**inputs, "input_ids": torch.where(labels == -100, inputs["input_ids"], 10 + inputs["input_ids"] % 80)}
    told = labels != -100
    before, after = entering(model, inputs, labels), entering(model, other, labels)
    assert torch.equal(before[~told], after[~told])
    assert torch.equal(after[told], raw(model, other)[told])  # answers themselves stay raw
    before, after = entering(model, inputs), entering(model, other)  # without labels all of the prompt is instruction
    assert not torch.allclose(before[~told], after[~told], atol=1e-3)


def test_padding_stays_raw_and_changes_nothing():
    model = mini()
    inputs = tiny.prompts(model)
    embeds, pad = entering(model, inputs), inputs["attention_mask"] == 0
    assert pad.any() and torch.equal(embeds[pad], raw(model, inputs)[pad])
    for row, sample in enumerate(tiny.samples(model)):
        alone = entering(model, tiny.prompts(model, [sample]))[0]
        torch.testing.assert_close(embeds[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_without_fusion_layers_the_text_stays_raw():
    model = mini(fusion_layers=0)
    inputs = tiny.prompts(model)
    text = ~visual(model, inputs)
    assert torch.equal(entering(model, inputs)[text], raw(model, inputs)[text])


def test_without_fusion_and_compression_it_is_plain_llava_exactly():
    plain = tiny.tiny_llava(side=8)
    inputs = tiny.prompts(plain)
    assert torch.equal(tiny.run(mini(side=None, fusion_layers=0), inputs), tiny.run(plain, inputs))
    assert not torch.allclose(tiny.run(mini(side=None, fusion_layers=1), inputs), tiny.run(plain, inputs), atol=1e-2)


def test_fusion_runs_once_at_prefill():
    model = mini()
    inputs = tiny.prompts(model)
    with watched(model.bridge.fusion) as calls:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len(calls) == 1
    with watched(model.bridge.fusion) as calls:
        tiny.run(model, tiny.text_only(model))
    assert calls == []


def test_positions_count_instructions_only():
    model = mini()
    inputs, labels = two_turns(model)
    with watched(model.bridge.fusion) as calls, torch.no_grad():
        model(**inputs, labels=labels)
    mask, positions = calls[0]["attention_mask"][0].bool(), calls[0]["position_ids"][0]
    assert torch.equal(positions[mask], torch.arange(int(mask.sum())))
    assert int(mask.sum()) == 64 + 1 + int(((labels == -100) & ~visual(model, inputs)).sum())


def test_the_text_is_the_mean_over_pictures_fused_one_by_one():
    model = mini()
    single = tiny.prompts(model, [tiny.Sample(((),), (4, 6), 1)])
    ids = single["input_ids"]
    at = int(visual(model, single)[0].nonzero()[0])
    video = torch.cat([ids[:, :at], ids[:, at : at + 1], ids[:, at:]], 1)
    pixels = torch.cat([single["pixel_values"], torch.randn_like(single["pixel_values"])])
    both = entering(model, {"input_ids": video, "attention_mask": torch.ones_like(video), "pixel_values": pixels})
    each = torch.cat([entering(model, {**single, "pixel_values": one[None]}) for one in pixels])
    text = ~visual(model, {"input_ids": video})[0]
    torch.testing.assert_close(both[0, text], each[:, ~visual(model, single)[0]].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[0, ~text], each[:, at], atol=1e-5, rtol=1e-5)


def test_embeddings_are_detached_on_their_way_into_the_fusion():
    model = mini()
    inputs = tiny.prompts(model)
    table = model.get_input_embeddings().weight
    with watched(model.model.language_model) as calls:
        model(**inputs)
    row = inputs["input_ids"][0, -1]
    assert torch.autograd.grad(calls[0]["inputs_embeds"].sum(), table)[0][row].abs().sum() == 0


def test_tiles_are_joined_to_one_grid():
    model = mini(tiles=2)
    cells = torch.arange(4 * 64.0).view(1, 4, 64, 1)
    joined = model.bridge._joined(torch.cat([cells, torch.zeros(1, 1, 64, 1)], 1))[0, :, 0].view(16, 16)
    for tile, (y, x) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):
        assert torch.equal(joined[y : y + 8, x : x + 8].flatten(), cells[0, tile, :, 0])


def test_high_resolution_reads_five_pictures_and_gives_as_many_tokens():
    model = mini(tiles=2)
    inputs = tiny.prompts(model, tiny.one_image(model))
    parts = torch.randn(5, *inputs["pixel_values"].shape[1:])
    with watched(model.bridge.fusion) as calls:
        before = tiny.run(model, {**inputs, "pixel_values": parts})
    assert calls[0]["inputs_embeds"].shape[1] == 5 * 64 + 1 + inputs["input_ids"].shape[1]
    for part in range(5):
        other = parts.clone()
        other[part] += 1
        assert not torch.allclose(tiny.run(model, {**inputs, "pixel_values": other}), before, atol=1e-4)
    with pytest.raises(ValueError, match="5 pictures each, but there are 1"):
        tiny.run(model, inputs)


def test_pictures_of_high_resolution_are_cut():
    image = Image.new("RGB", (40, 40))
    image.paste("red", (20, 0, 40, 20))
    parts = tiles(image, 12)
    assert [part.size for part in parts] == [(12, 12)] * 5
    assert [part.getpixel((6, 6)) == (255, 0, 0) for part in parts] == [False, True, False, False, False]


def test_positions_of_the_keys_are_their_own_grids_unless_asked():
    own, released = mini(), mini(resized_positions=True)
    released.load_state_dict(own.state_dict())
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        shuffled = x[:, torch.randperm(64)]
        assert not torch.allclose(own.bridge.compressor(x), own.bridge.compressor(shuffled), atol=1e-3)
        torch.testing.assert_close(released.bridge.compressor(x), released.bridge.compressor(shuffled))


def test_values_have_no_positions():
    part = mini().bridge.compressor
    x, (weight, bias) = torch.randn(2, 64, 32), (part.attention.in_proj_weight, part.attention.in_proj_bias)
    with torch.no_grad():
        weight[:32], bias[:32] = 0, 0  # every query is 0: all keys weigh the same
        mean = part.attention.out_proj(part.norm_features(x).mean(1) @ weight[64:].T + bias[64:])
        torch.testing.assert_close(part(x)[:, 0], mean)


def test_embeddings_alone_are_refused():
    model = mini()
    inputs = tiny.prompts(model)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=raw(model, inputs), pixel_values=inputs["pixel_values"])


def test_placeholders_of_another_processor_are_refused():
    plain = tiny.tiny_llava(side=8)
    with pytest.raises(ValueError, match="192 image tokens, but its 3 images have 1 each; make it with the processor"):
        tiny.run(mini(), tiny.prompts(plain, tiny.samples(plain)[:2]))


def test_it_starts_from_the_language_models_layers_if_asked():
    demo = jeton.load_demo()
    model = bridge.attach(demo.model, "llava-mini")
    model.bridge.start_from(model.model.language_model)
    mine, its = model.bridge.fusion.layers, model.model.language_model.layers
    assert len(mine) == len(its) == 4
    assert all(torch.equal(a, b) and a is not b for x, y in zip(mine, its) for a, b in zip(x.parameters(), y.parameters()))


@pytest.mark.slow
def test_one_token_with_fusion_answers_what_one_token_alone_cannot():
    share = {}
    for layers in (0, 2):
        model = bridge.attach(toy.llava(), "llava-mini", side=1, fusion_layers=layers)
        share[layers] = toy.accuracy(toy.learn(model, 300))
    assert share[2] > share[0] + 0.15 and share[2] > 0.8, share
