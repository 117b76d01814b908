"""InternVL: scores on patches reach the right token through the pixel shuffle; tiles of an image share its budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from witness import Listening

import jeton
import tiny
import tiny_internvl
from jeton.engine import apply
from jeton.engine.encoder import EncoderSite
from jeton.models import VisionLanguage, adapt
from jeton.needs import ClassAttention, Need

NAME, SIDE, EACH = "InternVLForConditionalGeneration", tiny_internvl.SIDE, tiny_internvl.TOKENS
PATCHES = SIDE**2


def view() -> VisionLanguage:
    seen = adapt(tiny.model(NAME))
    assert isinstance(seen, VisionLanguage)
    return seen


def test_a_token_is_made_of_the_four_patches_that_the_models_own_shuffle_puts_together() -> None:
    net = tiny.model(NAME).model
    patches = torch.eye(PATCHES).view(1, SIDE, SIDE, PATCHES)
    shuffled = net.pixel_shuffle(patches, 0.5).flatten(0, 2).unflatten(1, (4, PATCHES)).sum(1)
    geometry = view().geometry({"pixel_values": torch.zeros(1, 3, 24, 24)}, "image")[0]
    named = torch.zeros_like(shuffled).scatter(1, geometry.source, 1)
    assert torch.equal(shuffled, named)
    # by hand: the token in row 1 and column 2 of 3 x 3 has rows 2 and 3, columns 4 and 5 of 6 x 6
    assert sorted(geometry.source[1 * 3 + 2].tolist()) == [2 * 6 + 4, 2 * 6 + 5, 3 * 6 + 4, 3 * 6 + 5]
    assert not torch.equal(geometry.source.sort(1).values, torch.arange(PATCHES).view(-1, 4))  # four in a row would be wrong


@pytest.mark.parametrize("patch", [0, 7, 13, 35, PATCHES + 2, 3 * PATCHES + 28])
@torch.no_grad()
def test_a_planted_class_attention_keeps_the_token_that_holds_the_patch(patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head's class token looks at one patch of one tile, so of that tile `fastervlm` must keep that patch's token."""
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))  # one image of four tiles

    def planted(site: EncoderSite, need: Need) -> Tensor:
        assert isinstance(need, ClassAttention)
        return torch.nn.functional.one_hot(torch.tensor(patch), 4 * PATCHES).float()[:, None].expand(-1, 4)

    monkeypatch.setattr(EncoderSite, "flat", planted)
    with apply(net, "fastervlm", keep=1, per="crop") as run:
        tiny.run(net, inputs)
        kept = [(grid >= 0).nonzero().tolist() for grid in run.assignment(0)]
    tile, own = divmod(patch, PATCHES)
    assert kept[tile] == [[own // SIDE // 2, own % SIDE // 2]]
    assert all(kept[other] == [[0, 0]] for other in range(4) if other != tile)  # nothing to choose by


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_attention_of_a_token_is_the_mean_over_its_patches(attention: str) -> None:
    """Against the tower's own maps, tile by tile; class attention is that of the patches, in the order of the shuffle."""
    eager = tiny.model(NAME, "eager")
    inputs = tiny.inputs_for(eager)
    maps = eager.model.vision_tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions[-1]
    patches = maps[:, :, 0, 1:].unflatten(2, (3, 2, 3, 2)).mean((3, 5)).flatten(2)  # (tiles, heads, tokens)
    net, hearing = tiny.model(NAME, attention), Listening("encoder", {"class": ClassAttention(layer=-1)})
    with apply(net, hearing) as run:
        tiny.run(net, inputs)
        tiles = [len(item.kinds) for item in run.layout.album.geometry]
    assert tiles == [4, 1, 3, 1, 1]
    for image, part in enumerate(patches.split(tiles)):
        heard = hearing.heard["class"][image, :, : tiles[image] * EACH]
        assert torch.allclose(heard, part.transpose(0, 1).flatten(1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_class_attention_is_that_of_the_block_whose_features_are_handed_on() -> None:
    net = tiny_internvl.tiny_internvl()
    net.config.vision_feature_layer = -2
    net.set_attn_implementation("eager")
    inputs = tiny.prompts(net, [tiny.Sample(((1,),), (3, 4), 1)])
    maps = net.model.vision_tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions[-2]
    hearing = Listening("encoder", {"class": ClassAttention(layer=-1)})
    with apply(net, hearing):
        tiny.run(net, inputs)
    own = maps[:, :, 0, 1:].unflatten(2, (3, 2, 3, 2)).mean((3, 5)).flatten(2)
    assert torch.allclose(hearing.heard["class"], own, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_tiles_share_the_budget_of_their_image_unless_each_has_its_own() -> None:
    net = tiny.model(NAME)
    inputs = tiny.inputs_for(net)
    tiles = [4, 1, 3, 1, 1]
    for per in ("image", "crop"):
        with apply(net, "fastervlm", keep=5, per=per) as run:
            tiny.run(net, inputs)
            kept = [[int((grid >= 0).sum()) for grid in run.assignment(image)] for image in range(5)]
        assert [len(each) for each in kept] == tiles
        assert [sum(each) for each in kept] == [5] * 5 if per == "image" else all(set(each) == {5} for each in kept)
    with apply(net, "divprune", keep=20) as run:  # more than any tile has, less than the first image
        tiny.run(net, inputs)
        assert [image.after for image in run.report().images] == [20, 9, 20, 9, 9]
        spans = [(span.kind, span.length) for span in run.layout.spans(0) if span.kind != "text"]
        assert spans == [("crop", EACH)] * 3 + [("thumbnail", EACH)]


def test_what_pixel_shuffle_has_no_place_for_is_refused() -> None:
    net = tiny.model(NAME)
    inputs = tiny.inputs_for(net)
    wide = torch.cat([inputs["pixel_values"]] * 2, -1)
    with apply(net, "divprune", keep=5):
        with pytest.raises(jeton.Unsupported, match="6 x 12 patches"):
            net(**{**inputs, "pixel_values": wide})
        with pytest.raises(jeton.Unsupported, match="class token"):
            net(**inputs, vision_feature_select_strategy="full")
    with pytest.raises(jeton.Unsupported, match="mixes neighbouring patches"):
        apply(net, "tome").remove()


@torch.no_grad()
def test_the_tower_alone_merges_tokens_and_takes_smaller_pictures() -> None:
    net = tiny.model("InternVLVisionModel")
    pixels = tiny.inputs_for(net)["pixel_values"]
    with apply(net, "tome", keep=0.5) as run:
        net(pixel_values=pixels)
        assert run.tokens.features.shape[1] == 1 + 24
    with apply(net, "downsample", keep=0.25) as run:
        net(pixel_values=pixels)
        few = run.tokens.features.shape[1]
    assert few < 1 + 25
