"""Qwen3-VL: DeepStack features stay with their tokens wherever these leave or are merged; frames are units of a video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from witness import Stand, watching

import tiny
from jeton.engine import apply, watch
from jeton.method import get
from jeton.models import adapt
from jeton.tokens import Reduction, Tokens

NAME = "Qwen3VLForConditionalGeneration"


@contextmanager
def deep_features(net: nn.Module) -> Iterator[list[Tensor]]:
    """What the unreduced model hands to its language model, on the columns of the prompt: (B, L, D) for each level."""
    found: list[Tensor] = []

    def hear(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shown = kwargs["visual_pos_masks"]
        for level in kwargs["deepstack_visual_embeds"]:
            found.append(level.new_zeros(*shown.shape, level.shape[-1]).masked_scatter(shown[..., None], level))

    handle = net.model.language_model.register_forward_pre_hook(hear, with_kwargs=True)
    yield found
    handle.remove()


class Half(Stand):
    """Keeps every second token, and gives each the mean of itself and the one behind it."""

    def reduce(self, tokens: Tokens, signals=None) -> Reduction:
        n = len(tokens)
        index = torch.arange(0, n - 1, 2).expand(tokens.features.shape[0], -1)
        assign = (torch.arange(n) // 2).clamp(max=index.shape[1] - 1).expand(tokens.features.shape[0], -1)
        return Reduction(index, assign, torch.full(assign.shape, 0.5))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["divprune(keep=0.3)", "fastv(keep=0.3, layer=1)", "fastv(keep=0.3, layer=2)"])
def test_each_token_gets_its_own_deepstack_features_behind_its_layers(spec: str) -> None:
    net = tiny.model(NAME)
    inputs = tiny.inputs_for(net)
    inputs["position_ids"] = tiny.positions(net, inputs)
    with deep_features(net) as own:
        tiny.run(net, inputs)
    assert len(own) == 2
    from references import added, columns, full_columns, kept_at

    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, spec), watching(net) as seen:
        tiny.run(net, inputs)
    got = added(seen, whole, inputs)
    for level, (features, given) in enumerate(zip(own, got, strict=True)):
        there = kept_at(seen, whole, level, inputs)
        assert torch.allclose(given, features * there[..., None], atol=1e-5)
        lost = ~there & (features.abs().sum(-1) > 0)
        assert bool(lost.any()) == (spec.startswith("divprune") or (level == 1 and "layer=1" in spec))
    assert int((columns(seen.ids, full_columns(net, inputs), seen.real()) >= 0).sum()) > 0


@torch.no_grad()
def test_merged_tokens_get_their_deepstack_features_merged() -> None:
    """Pairs by hand: a token's features are the mean of the two, at the entrance's embeddings and at every level."""
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with deep_features(net) as own, watching(net) as whole:
        tiny.run(net, inputs)
    at = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    with apply(net, Half(get("random", keep=0.5), [])), watching(net) as seen:
        tiny.run(net, inputs)
    first = int(at[0])
    for made, before in [(seen.embeds, whole.embeds), *zip(seen.deep, own, strict=True)]:
        pairs = before[0, at].unflatten(0, (-1, 2)).mean(1)
        assert torch.allclose(made[0, first : first + len(pairs)], pairs, atol=1e-5)
        assert not torch.allclose(made[0, first : first + len(pairs)], before[0, at[::2]], atol=1e-3)


@torch.no_grad()
def test_tokens_merged_between_the_layers_get_what_is_still_to_come_merged() -> None:
    """In front of layer 1: the first level has been added to all, of the second each pair gets the mean."""
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with deep_features(net) as own:
        tiny.run(net, inputs)
    at = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    with apply(net, Half(get("fastv", keep=0.5, layer=1), [])), watching(net) as seen:
        tiny.run(net, inputs)
    first, half = int(at[0]), len(at) // 2
    assert torch.allclose(seen.deep[0], own[0], atol=1e-5)
    pairs = own[1][0, at].unflatten(0, (-1, 2)).mean(1)
    assert torch.allclose(seen.deep[1][0, first : first + half], pairs, atol=1e-5)
    assert float(seen.deep[1][0, first + half :].abs().max()) < 1e-5 and seen.deep[1].shape[1] == own[1].shape[1] - half


@torch.no_grad()
def test_patches_that_leave_before_the_tower_leave_from_its_deepstack_features_too() -> None:
    """Kept tokens of a picture without what was dropped: the same as the tower run on those patches alone; no others arrive."""
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))
    pixels = inputs["pixel_values"].clone()
    pixels[: len(pixels) // 2] = 0.25  # the upper half of the picture shows nothing
    inputs["pixel_values"] = pixels
    with apply(net, "pixelworld") as run, watching(net) as seen:
        tiny.run(net, inputs)
        after = run.report().images[0].after
    assert 12 <= after < 24
    assert [int((level[0].abs().sum(-1) > 1e-4).sum()) for level in seen.deep] == [after, after]


@torch.no_grad()
def test_a_training_step_reaches_the_deepstack_mergers() -> None:
    net = tiny.BUILDERS[NAME]()
    inputs = tiny.prompts(net, tiny.one_image(net))
    with torch.enable_grad(), apply(net, "divprune", keep=0.5):
        net(**inputs, labels=inputs["input_ids"]).loss.backward()
    for merger in net.model.visual.deepstack_merger_list:
        assert float(merger.linear_fc2.weight.grad.abs().sum()) > 0


def test_frames_are_units_though_each_is_a_run_of_its_own() -> None:
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, [tiny.Sample(((3, 4, 6),), (2, 4), 1)])
    with watch(net) as run:
        tiny.run(net, inputs)
        geometry = run.layout.album.geometry[0]
        spans = [(span.kind, span.unit, span.length) for span in run.layout.spans(0)]
    assert geometry.kinds == ("frame",) * 3
    assert [span for span in spans if span[0] == "frame"] == [("frame", 0, 6), ("frame", 1, 6), ("frame", 2, 6)]
    assert [kind for kind, *_ in spans] == ["text", "frame", "text", "frame", "text", "frame", "text"]


@torch.no_grad()
def test_a_token_is_made_of_the_four_patches_it_names() -> None:
    """Change a group of patches where the tower does not mix: the named token changes, at every level."""
    net = tiny.BUILDERS[NAME]()
    for block in net.model.visual.blocks:
        block.attn.proj.weight.zero_()
    inputs = tiny.prompts(net, tiny.one_image(net))
    own = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    geometry = adapt(net).geometry(own, "image")[0]
    before = net.model.get_image_features(**own)
    for token in (0, 7, 23):
        pixels = own["pixel_values"].clone()
        pixels[geometry.source[token]] += 1
        after = net.model.get_image_features(**{**own, "pixel_values": pixels})
        for now, was in [
            (after.pooler_output, before.pooler_output),
            *zip(after.deepstack_features, before.deepstack_features, strict=True),
        ]:
            now, was = (torch.cat(list(each)) if not isinstance(each, Tensor) else each for each in (now, was))
            assert (now - was).abs().amax(1).gt(1e-4).nonzero().flatten().tolist() == [token]
