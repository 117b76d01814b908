"""Attention as if merged tokens stood at all their places, against a decoder written out token by token."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from references import CLOSE, TIGHT, difference, generated
from torch import Tensor, nn
from witness import watching

import jeton
import tiny
from jeton.engine import apply
from jeton.engine.flow import Step
from jeton.engine.virtual import _followed
from jeton.layout import Rows
from jeton.models import adapt
from jeton.tokens import Reduction

LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"


def placed(run: Any, inputs: tiny.Inputs, sample: int) -> list[list[int]]:
    """For every token that enters the language model, the columns of the unpadded prompt it stands at, in order."""
    layout = run.layout
    ids = inputs["input_ids"][sample]
    front = int((inputs["attention_mask"][sample] == 0).sum())
    owner = {column: column for column in range(front, len(ids))}
    for image in (i for i, at in enumerate(layout.sample) if at == sample):
        geometry, columns = layout.album.geometry[image], layout.position[image].tolist()
        maps = {
            int(unit): grid for unit, grid in zip(sorted(set(geometry.unit.tolist()) - {-1}), run.assignment(image), strict=True)
        }
        for slot in range(len(geometry)):
            unit, row, col = (int(getattr(geometry, name)[slot]) for name in ("unit", "row", "col"))
            if unit >= 0:
                stands = int(maps[unit][row, col])
                owner[columns[slot]] = -1 if stands < 0 else columns[stands]
    groups: dict[int, list[int]] = {}
    for column, at in sorted(owner.items()):
        if at >= 0:
            groups.setdefault(at, []).append(column - front)
    return [groups[at] for at in sorted(groups)]


def by_hand(net: nn.Module, embeds: Tensor, groups: list[list[int]], first_only: bool = False) -> Tensor:
    """(n, V) logits of a prompt whose n tokens stand at several positions each: everything expanded, layer by layer; or the first
    layer's attention before its output projection, (n, H d)."""
    view = adapt(net)
    places = sorted((place, token) for token, group in enumerate(groups) for place in group)
    ids, owner = (torch.tensor(list(x)) for x in zip(*places, strict=True))
    cos, sin = view.rotary(embeds[None], ids[None])
    x = embeds
    for layer in view.layers:
        part = layer.self_attn
        turn = sys.modules[type(part).__module__].apply_rotary_pos_emb
        h = layer.input_layernorm(x)[owner]
        q, k, v = (getattr(part, f"{name}_proj")(h).unflatten(-1, (-1, part.head_dim)).transpose(0, 1)[None] for name in "qkv")
        q, k = turn(q, k, cos, sin)
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        scores = q @ k.mT * part.scaling
        scores = scores.masked_fill(~torch.ones(len(ids), len(ids), dtype=torch.bool).tril(), -torch.inf)
        mixed = (scores.softmax(-1) @ v)[0].transpose(0, 1).flatten(1)
        mixed = torch.stack([mixed[owner == token].mean(0) for token in range(len(groups))])
        if first_only:
            return mixed
        x = x + part.o_proj(mixed)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return net.lm_head(view.decoder.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method", ["dymu(keep=0.3)", "dymu(thresholds=(0.5, 0.4, 0.5, 0.4))", "dymu(keep=0.5) | divprune(keep=0.5)"]
)
@pytest.mark.parametrize("model", [LLAVA, NEXT])
def test_the_language_model_computes_what_is_written_out_by_hand(model: str, method: str, attention: str) -> None:
    net = tiny.model(model, attention)
    inputs = tiny.prompts(net)
    inputs["position_ids"] = tiny.positions(net, inputs)
    with apply(net, method, newlines="keep") as run, watching(net) as seen:
        logits = tiny.run(net, inputs)
        groups = [placed(run, inputs, sample) for sample in range(3)]
    for sample in range(3):
        real = seen.real()[sample]
        embeds = seen.embeds[sample][real]
        assert len(groups[sample]) == len(embeds) and max(map(len, groups[sample])) > 1
        right = by_hand(net, embeds, groups[sample])
        assert difference(logits[sample][real], right) < CLOSE
        # the twin: each token at one of its places only
        alone = by_hand(net, embeds, [group[:1] for group in groups[sample]])
        assert difference(alone, right) > 100 * CLOSE


@torch.no_grad()
def test_the_first_layer_is_that_of_the_full_model_on_repeated_embeddings_and_later_ones_are_near() -> None:
    """The full model gets the merged embeddings repeated at all their places; its attention is averaged token by token."""
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    heard: list[list[Tensor]] = [[], []]
    with apply(net, "dymu", keep=0.3) as run, watching(net) as seen, listening(net, heard[0]):
        tiny.run(net, inputs)
        groups = placed(run, inputs, 0)
    owner = torch.empty(inputs["input_ids"].shape[1], dtype=torch.long)
    for token, group in enumerate(groups):
        owner[group] = token
    with listening(net, heard[1]):
        net.model.language_model(inputs_embeds=seen.embeds[:, owner])
    gaps = []
    for short, full in zip(*heard, strict=True):
        averaged = torch.stack([full[0, owner == token].mean(0) for token in range(len(groups))])
        gaps.append(difference(short[0], averaged))
    assert gaps[0] < TIGHT
    assert all(gap > 100 * TIGHT for gap in gaps[1:])  # grouped tokens drift apart in the full model
    torch.testing.assert_close(heard[0][0][0], by_hand(net, seen.embeds[0], groups, first_only=True), atol=1e-5, rtol=1e-5)


class listening:
    """Collects what enters each layer's output projection."""

    def __init__(self, net: nn.Module, into: list[Tensor]) -> None:
        self.net, self.into = net, into

    def __enter__(self) -> None:
        hook = lambda module, args: self.into.append(args[0])  # noqa: E731
        self.handles = [layer.self_attn.o_proj.register_forward_pre_hook(hook) for layer in adapt(self.net).layers]

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def test_where_nothing_merges_the_language_model_is_bitwise_the_base() -> None:
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net)
    before = tiny.run(net, inputs)
    for method in ("dymu(keep=1.0)", "dymu(thresholds=(1.0, 1.0, 1.0, 1.0))"):
        with apply(net, method):
            assert torch.equal(tiny.run(net, inputs), before)


@pytest.mark.parametrize("method", ["dymu(thresholds=(0.5, 0.4, 0.5, 0.4))", "dymu(keep=0.5) | fastv(layer=2, keep=0.5)"])
def test_greedy_with_a_cache_says_what_the_whole_prompt_says_at_each_step(method: str) -> None:
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net)
    with apply(net, method):
        output = generated(net, inputs, max_new_tokens=6)
        if "fastv" not in method:  # whose last token, and with it the kept set, changes as the prompt grows
            new = output.sequences[:, -6:]
            longer = tiny.extended(inputs, new[:, :-1])
            longer["position_ids"] = tiny.positions(net, longer)
            again = tiny.run(net, longer, use_cache=False)[:, -6:]
            assert difference(torch.stack(output.logits, 1), again) < CLOSE
        cache = output.past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
    assert all(length < inputs["input_ids"].shape[1] for length in held)


def test_the_report_counts_attention_over_all_places() -> None:
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net)
    flops = []
    for unmerge in (True, False):
        with apply(net, "dymu", keep=0.3, unmerge=unmerge) as run:
            tiny.run(net, inputs)
            flops.append(run.report().flops)
    length, width, layers = inputs["input_ids"].shape[1], 64, 4
    short = length - 2 * (49 - 15)
    # the longest prompt has two images: that many columns go
    longest = max(int((row == tiny.IMAGE).sum()) for row in inputs["input_ids"])
    assert longest == 98
    ran = run.costs.arrived
    assert flops[0] - flops[1] == pytest.approx(3 * layers * 4 * width * (length**2 - ran**2), abs=100) and ran >= short


def test_flash_attention_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model(LLAVA)
    monkeypatch.setattr(net.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(jeton.Unsupported, match=r"dymu.*flash.*unmerge=False"):
        apply(net, "dymu").remove()


def test_padding_of_an_image_with_fewer_tokens_says_nothing_of_those_it_repeats() -> None:
    """Two images of 4 and 3 tokens, merged in pairs and 1 + 2; the second's padding repeats its first slot."""
    before = Rows(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]]))
    merged = Reduction(torch.tensor([[0, 2], [0, 1]]), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), weight=torch.ones(2, 4))
    step = Step(before, merged, 0, Rows(torch.tensor([[0, 2], [0, 1]]), None))
    assert _followed(torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]]), step, 4).tolist() == [[0, 0, 2, 2], [0, 1, 1, -1]]
