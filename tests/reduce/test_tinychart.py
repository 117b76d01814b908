"""TinyChart's tower: counts, equal neighbours lose nothing, and a prompt that is shorter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import jeton
import tiny
from jeton.method import get
from jeton.reduce.tinychart import TinyChart
from jeton.tokens import Tokens


def test_the_published_counts():
    method = get("tinychart")
    assert [method.promise(2916, depth).count for depth in (1, 26, 27)] == [2832, 732, 648]
    step = method.steps(2916, 27)[0].reduce(Tokens(torch.randn(1, 2916, 4)))
    assert step.k == 2832
    with pytest.raises(ValueError, match="whole number"):
        get("tinychart", r=1.5)


@torch.no_grad()
def test_merging_nothing_is_the_tower_as_it_is():
    model = tiny.model("SiglipVisionModel")
    inputs = tiny.inputs_for(model)
    whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    with jeton.apply(model, "tinychart", r=0):
        torch.testing.assert_close(model(**inputs, output_hidden_states=True).hidden_states[-1], whole, atol=1e-5, rtol=0)
    with jeton.apply(model, "tinychart", r=4):
        assert model(**inputs).last_hidden_state.shape[1] == 49 - 5 * 4


@dataclass(frozen=True)
class First(TinyChart):
    """Merges in block 0 alone."""

    def steps(self, n, depth):
        return [*super().steps(n, depth)[:1], *[None] * (depth - 1)]


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"proportional": False}], ids=str)
def test_equal_neighbours_lose_nothing_with_the_size_bias(fields):
    """Two blocks, merging in the first: neighbouring patches 2i and 2i + 1 are equal, and positions say nothing."""
    model = tiny.tiny_siglip(num_hidden_layers=2, image_size=8 * tiny.PATCH)
    model.embeddings.position_embedding.weight.zero_()
    patches = torch.randn(2, 8, 4, 3, tiny.PATCH, tiny.PATCH).repeat_interleave(2, 2)
    pixels = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    plain = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    seen = []
    handle = model.encoder.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with jeton.apply(model, First(r=20, **fields)) as run:
        model(pixel_values=pixels)
        size = run.tokens.size
    handle.remove()
    assert seen[0].shape[1] == 44 and (size.sum(1) == 64).all()  # twenty pairs are one token, twelve are two
    mean = (seen[0] * size[..., None]).sum(1) / 64
    if not fields:
        torch.testing.assert_close(mean, plain.mean(1), atol=1e-4, rtol=1e-4)
    else:
        assert (mean - plain.mean(1)).abs().max() > 1e-3


@torch.no_grad()
def test_a_table_of_positions_for_large_charts():
    model = tiny.model("SiglipVisionModel")
    with jeton.apply(model, "tinychart", r=20):
        out = model(pixel_values=torch.randn(1, 3, 14 * tiny.PATCH, 14 * tiny.PATCH), interpolate_pos_encoding=True)
    assert out.last_hidden_state.shape[1] == 196 - 5 * 20


@torch.no_grad()
def test_the_prompt_is_shorter_by_what_merged():
    model = tiny.model("LlavaForConditionalGeneration-siglip")
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "tinychart", r=6) as run:
        tiny.run(model, inputs)
        report = run.report()
    assert all((image.before, image.after) == (49, 49 - 5 * 6) for image in report.images)
    assert report.flops < report.flops_full
