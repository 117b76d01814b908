"""Pixtral's tower alone, in Mistral 3 and in LLaVA."""

from __future__ import annotations

import pytest
import torch
from cases import LLAVA_PIXTRAL, MISTRAL3
from witness import Listening

import jeton
import tiny
from jeton.models import adapt
from jeton.needs import PatchEntropy, ReceivedAttention
from jeton.ops import pixels
from patches import heard_scores, squares

SIDES = {MISTRAL3: 2, LLAVA_PIXTRAL: 1}
GRIDS = [(8, 12), (6, 6), (9, 4), (7, 10)]  # patches of the pictures in tiny's three prompts; two of them odd


@pytest.mark.parametrize("name", SIDES)
def test_scores_of_patches_become_scores_of_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, side = tiny.model(name), SIDES[name]
    scores = torch.rand(sum(height * width for height, width in GRIDS))
    told = heard_scores(net, tiny.inputs_for(net), scores, monkeypatch)
    parts = scores.split([height * width for height, width in GRIDS])
    for mine, part, grid in zip(told, parts, GRIDS, strict=True):
        assert torch.allclose(mine, squares(part, *grid, side))
    assert not torch.allclose(told[0], squares(parts[0].view(8, 12).mT.flatten(), 8, 12, side))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pictures_do_not_look_at_each_other_in_what_methods_hear(attention: str) -> None:
    """The tower attends to all pictures in one call under a mask."""
    net = tiny.model(LLAVA_PIXTRAL, attention)
    listener = Listening("encoder", {"received": ReceivedAttention(layer=-1), "entropy": PatchEntropy()})
    together = tiny.prompts(net, tiny.samples(net)[1:2])
    with jeton.apply(net, listener):
        tiny.run(net, together)
    both, entropy = listener.heard["received"], listener.heard["entropy"]
    for number, (height, width) in enumerate([(24, 24), (36, 16)]):
        own = together["pixel_values"][number : number + 1, :, :height, :width]
        alone = Listening("encoder", {"received": ReceivedAttention(layer=-1)})
        ids = tiny.words(3, 1)
        visual = torch.full((1, height * width // 16), tiny.IMAGE)
        given = {"input_ids": torch.cat([visual, ids], 1), "pixel_values": own, "image_sizes": torch.tensor([(height, width)])}
        with jeton.apply(net, alone):
            tiny.run(net, given)
        assert torch.allclose(both[number, : visual.shape[1]], alone.heard["received"][0], atol=1e-5)
        grey = pixels.grey(pixels.cut(own, tiny.PATCH), adapt(net).encoder.pixel_mean, adapt(net).encoder.pixel_std)
        assert torch.allclose(entropy[number, : visual.shape[1]], pixels.entropy(grey)[0])


def test_the_tower_alone_is_seen_and_refused_with_a_way_out() -> None:
    net = tiny.model("PixtralVisionModel")
    inputs = tiny.inputs_for(net)
    view = adapt(net)
    assert [len(item) for item in view.geometry(inputs)] == [96, 36, 36]
    assert [len(item) for item in view.geometry({"pixel_values": inputs["pixel_values"]})] == [9 * 12] * 3
    with pytest.raises(jeton.Unsupported, match="packs all pictures"):
        jeton.apply(net, "tome")


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("newlines", ["drop", "pool"])
def test_break_tokens_stay_and_whoever_asks_otherwise_is_told(name: str, newlines: str) -> None:
    net = tiny.model(name)
    with pytest.raises(jeton.Unsupported, match="break tokens"):
        jeton.apply(net, "random", keep=0.5, newlines=newlines)
    inputs = tiny.inputs_for(net)
    breaks = int((inputs["input_ids"] == 7).sum())
    with jeton.apply(net, "visionzip", score="received", keep=4) as run:  # drops newlines where they are the model's own
        tiny.run(net, inputs)
        words = run.costs.real.sum() - 4 * len(GRIDS)
    assert int(words) == int((inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE)).sum()) and breaks


def test_break_tokens_are_not_words_of_the_question() -> None:
    net = tiny.model(MISTRAL3)
    inputs = tiny.inputs_for(net)
    with jeton.apply(net, "random", keep=0.5) as run:
        tiny.run(net, inputs)
        between, flow = run.layout.between, run.costs.flow
    assert torch.equal(between, inputs["input_ids"] == 7)
    assert flow.length < between.shape[1] and flow.between.shape == (len(between), flow.length)  # they move with the columns
    assert torch.equal(flow.between.sum(1), between.sum(1))
