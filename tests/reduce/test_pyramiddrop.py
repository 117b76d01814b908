"""PyramidDrop against its card. Greedy decoding against recomputation is in tests/contract, as for every method."""

from __future__ import annotations

import pytest
import torch

import tiny
from in_layers import Looking, eager, images
from jeton.engine import apply
from jeton.method import get
from jeton.models import adapt
from jeton.needs import LastAttention
from jeton.tokens import Tokens

CLOSE = 1e-5


def entering(method, n, depth):
    """Tokens that enter each layer."""
    out = []
    for step in method.steps(n, depth):
        n = n if step is None else step.promise(n).count
        out.append(n)
    return out


def test_the_papers_schedule_averages_270_tokens():
    lengths = entering(get("pyramiddrop"), 576, 32)
    assert lengths == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8 and sum(lengths) / 32 == 270
    assert lengths == entering(get("pyramiddrop", ratios=(0.5, 0.25, 0.125), layers=(8, 16, 24)), 576, 32)
    twin = entering(get("pyramiddrop", ratios=(0.5, 0.25, 0.125), layers=(9, 16, 24)), 576, 32)
    assert sum(twin) / 32 == 279


@pytest.mark.parametrize(("keep", "counts"), [(72, [288, 144, 72]), (0.25, [363, 229, 144]), (576, [576] * 3), (1, [69, 8, 1])])
def test_stages_keep_equal_shares_of_each_other(keep, counts):
    method = get("pyramiddrop", keep=keep)
    assert [step.keep for step in method.steps(576, 32) if step] == counts and method.promise(576).count == counts[-1]


def test_layers_follow_the_depth_and_may_be_set():
    def at(method, depth):
        return [layer for layer, step in enumerate(method.steps(100, depth)) if step]

    assert at(get("pyramiddrop"), 28) == [7, 14, 21] and at(get("pyramiddrop"), 4) == [1, 2, 3]
    assert at(get("pyramiddrop", layers=(2, 5)), 8) == [2, 5] and at(get("pyramiddrop"), 2) == [1]
    with pytest.raises(ValueError, match="layer 9 of 8; layers 1 to 7"):
        get("pyramiddrop", layers=(2, 9)).steps(100, 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratios": (0.5, 0.6, 0.1)}, "never grow"),
        ({"ratios": (0.5, 0.1)}, "say with layers"),
        ({"layers": (3, 2)}, "ascending"),
        ({"layers": ()}, "nothing to do"),
        ({"ratios": (0.5, 0.25, 0.125), "layers": (1, 2)}, "3 layers"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("pyramiddrop", **fields)


def test_ratios_of_one_change_nothing():
    net = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "pyramiddrop", ratios=(1.0, 1.0, 1.0)):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "pyramiddrop", ratios=(1.0, 1.0, 0.9)):
        assert not torch.equal(tiny.run(net, inputs), before)


@pytest.mark.parametrize("early", [None, "fastv(layer=1, keep=30)"])
def test_the_row_computed_ahead_is_the_eager_row(early):
    """Grouped-query attention, a padded batch, several images; also when tokens have gone before."""
    net = tiny.model("LlavaForConditionalGeneration", "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(2, row=LastAttention(ahead=True), before=LastAttention())
    with apply(net, look if early is None else get(early) | look) as run:
        maps = eager(net, inputs)
        at = run.costs.flow.at
        length = run.costs.flow.length
    for image, (sample, _) in enumerate(images(net, inputs)):
        columns = at[image] - sample * length
        row = look.heard["row"][image].mean(0)
        assert (row - maps[2][sample, -1, columns]).abs().max() < CLOSE
        assert (row - maps[1][sample, -1, columns]).abs().max() > 100 * CLOSE  # the twin: the layer before
        if early is None:
            assert (look.heard["before"][image].mean(0) - maps[1][sample, -1, columns]).abs().max() < CLOSE


def test_it_keeps_what_the_last_token_is_about_to_attend_to():
    attention = torch.tensor([[[0.1, 0.2, 0.3, 0.0], [0.3, 0.0, 0.3, 0.0]]])
    method = get("pyramiddrop", keep=2)
    assert method.needs() == {"attention": LastAttention(ahead=True)}
    assert method.reduce(Tokens(torch.randn(1, 4, 2)), {"attention": attention}).index.tolist() == [[0, 2]]


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_compact_positions_are_renumbered_at_every_stage(positions):
    from witness import watching

    net = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.prompts(net, tiny.one_image(net))
    with apply(net, "pyramiddrop", positions=positions), watching(net) as seen:
        tiny.run(net, inputs)
    same = []
    for layer in seen.layers:
        ids = torch.arange(layer["hidden"].shape[1])[None]
        cos, _ = adapt(net).rotary(layer["hidden"], ids)
        same.append(torch.allclose(cos, layer["rotary"][0], atol=1e-6))
    assert same == [True] * 4 if positions == "compact" else same == [True, False, False, False]


@pytest.mark.parametrize("spec", ["pyramiddrop(keep=7)", "fastv(layer=1, keep=0.6) | pyramiddrop(layers=(2, 3), keep=0.3)"])
def test_images_of_different_lengths_follow_their_own_plans(spec):
    """Also where another method has taken tokens before, and where one prompt of the batch loses nothing at a stage."""
    net = tiny.model("Qwen2_5_VLForConditionalGeneration")
    chosen = tiny.samples(net)
    together = tiny.prompts(net, chosen)
    with apply(net, spec) as run:
        batch = tiny.run(net, {**together, "position_ids": tiny.positions(net, together)})[:, -1]
        counts = [image.after for image in run.report().images]
        for number, sample in enumerate(chosen):
            alone = tiny.prompts(net, [sample])
            single = tiny.run(net, {**alone, "position_ids": tiny.positions(net, alone)})[0, -1]
            assert (batch[number] - single).abs().max() < 1e-4 * single.abs().max()
    assert counts == ([7, 7, 7, 7] if "|" not in spec else [4, 2, 2, 4])
