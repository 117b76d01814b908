"""GLM-4V: videos written with image tokens, partial rotary embeddings, sandwich norms and a fused gated MLP."""

from __future__ import annotations

import pytest
import torch
from references import CLOSE, TIGHT, difference, generated, recomputed
from witness import spied, watching

import tiny
from jeton.engine import apply
from jeton.method import get
from jeton.models import VisionLanguage, adapt

NAME = "Glm4vForConditionalGeneration"
VIDEO = tiny.Sample(((3, 6, 8),), (4, 9), 4)
VIDEOS = [VIDEO, tiny.Sample(((2, 4, 8),), (1, 6), 5)]


def view() -> VisionLanguage:
    seen = adapt(tiny.model(NAME))
    assert isinstance(seen, VisionLanguage)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("method", ["divprune", "fastervlm(score='received', per='frame')", "fastv"])
def test_videos_are_reduced_and_spoken_of(method: str) -> None:
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, VIDEOS)
    assert set(inputs["mm_token_type_ids"].unique().tolist()) == {0, 2}
    asked = get(method)
    spy, decided = spied(asked)
    with apply(net, spy) as run:
        output = generated(net, inputs, max_new_tokens=6)
        assert [item.kinds for item in run.layout.album.geometry] == [("frame",) * 3, ("frame",) * 2]
        images = run.report().images
    assert [image.before for image in images] == [36, 16] and all(image.after < image.before for image in images)
    new = output.sequences[:, -6:]
    reference = recomputed(net, inputs, asked, decided, new)
    assert difference(torch.stack(output.logits, 1), reference) < CLOSE and torch.equal(reference.argmax(-1), new)


@torch.no_grad()
def test_removing_from_a_video_equals_masking() -> None:
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, [VIDEO])
    inputs["position_ids"] = tiny.positions(net, inputs)
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, "divprune", keep=0.3), watching(net) as seen:
        last = tiny.run(net, inputs)[:, -1]
    here = (whole.embeds[0][:, None] == seen.embeds[0]).all(2).any(1)
    language = net.model.language_model
    for mask, near in ((here, True), (torch.ones_like(here), False)):
        masked = language(inputs_embeds=whole.embeds, attention_mask=mask[None].long(), position_ids=inputs["position_ids"])
        assert (difference(net.lm_head(masked.last_hidden_state[:, -1]), last) < TIGHT) == near


@torch.no_grad()
def test_images_and_videos_in_one_batch_are_the_models_to_refuse() -> None:
    """It reads both from the same token, so that neither fits; jeton adds nothing, and is none the worse afterwards."""
    net = tiny.model(NAME)
    video, image = tiny.prompts(net, [VIDEO]), tiny.prompts(net, tiny.one_image(net))
    ids = torch.cat([image["input_ids"], video["input_ids"]], 1)
    types = torch.cat([image["mm_token_type_ids"], video["mm_token_type_ids"]], 1)
    both = {**image, **video, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    with pytest.raises(Exception, match="do not match"):
        net(**both)
    with apply(net, "divprune", keep=0.3) as run:
        with pytest.raises(Exception, match="do not match"):
            net(**both)
        tiny.run(net, image)
        assert [item.after < item.before for item in run.report().images] == [True]


@torch.no_grad()
def test_the_halves_of_a_layer_put_together_are_the_layer() -> None:
    """With norms behind attention and MLP, too; and the fused projection's halves are the projection."""
    net, seen = tiny.model(NAME), view()
    x = torch.randn(2, 7, 64)
    rotary = seen.rotary(x, torch.arange(7).expand(3, 2, -1))
    for layer in seen.layers:
        parts, gated = seen.parts(layer), seen.gated(layer)
        attended, _ = parts.attention(hidden_states=parts.norm1(x), position_embeddings=rotary, attention_mask=None)
        mine = x + parts.scale1(attended)
        normed = parts.norm2(mine)
        hidden = gated.act(gated.gate(normed)) * gated.up(normed)
        assert torch.allclose(gated.down(hidden), parts.mlp(normed), atol=1e-5)
        mine = mine + parts.scale2(parts.mlp(normed))
        assert torch.allclose(mine, layer(x, position_embeddings=rotary), atol=1e-5)
        assert gated.gate.weight.data_ptr() == layer.mlp.gate_up_proj.weight.data_ptr()
    assert net.config.text_config.rope_parameters["partial_rotary_factor"] == 0.5


@torch.no_grad()
@pytest.mark.parametrize("part", ["ffn", "parallel", "attention", "block"])
def test_a_rule_runs_the_layers_norms_behind_its_halves(part: str) -> None:
    """`ima` on the visual tokens of a layer, against the layer's halves put together by hand."""
    net, seen = tiny.model(NAME), view()
    inputs = tiny.prompts(net, tiny.one_image(net))
    layer, captured = seen.layers[2], {}

    def hear(module, args, kwargs, output) -> None:
        captured.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"], output=output)

    with apply(net, "ima", skip=part, interval=2, start=1, end=3, scope="visual"):
        handle = layer.register_forward_hook(hear, with_kwargs=True)
        tiny.run(net, inputs)
        handle.remove()
    x, parts = captured["hidden"], seen.parts(layer)
    visual = (inputs["input_ids"] == tiny.IMAGE)[..., None]
    given = {name: captured[name] for name in ("position_embeddings", "attention_mask")}
    attended = x + parts.scale1(parts.attention(hidden_states=parts.norm1(x), **given)[0])
    fed = attended + parts.scale2(parts.mlp(parts.norm2(attended)))
    skipped = {
        "block": x,
        "ffn": attended,
        "attention": x + parts.scale2(parts.mlp(parts.norm2(x))),
        "parallel": attended + parts.scale2(parts.mlp(parts.norm1(x))),
    }[part]
    assert torch.allclose(captured["output"], torch.where(visual, skipped, fed), atol=1e-4)


@torch.no_grad()
def test_pictures_that_lose_all_groups_leave_the_tower_in_order() -> None:
    """Position embeddings are sampled by the grid of each sequence: a picture that is gone must not lend its own to the next."""
    net, seen = tiny.model(NAME), view()
    grid = torch.tensor([(1, 4, 4), (1, 8, 4), (1, 4, 6)])
    pixels = torch.randn(16 + 32 + 24, 96)
    whole = {"hidden_states": pixels, "grid_thw": grid}
    kept = torch.cat([torch.arange(4, 8), 48 + torch.arange(8)])
    short = net.model.visual(**seen.encoder.shortened(whole, kept)).pooler_output
    # the same groups, each picture in a call of its own
    first = {"hidden_states": pixels[:16], "grid_thw": grid[:1]}
    third = {"hidden_states": pixels[48:], "grid_thw": grid[2:]}
    alone = [
        net.model.visual(**seen.encoder.shortened(one, at)).pooler_output
        for one, at in ((first, torch.arange(4, 8)), (third, torch.arange(8)))
    ]
    assert torch.allclose(short, torch.cat(alone), atol=1e-5)
