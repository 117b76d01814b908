"""With kept positions, removing tokens equals masking them: the exactness test of everything that happens in the prompt.

Each test has a twin that must fail: the same comparison with one token too many, or with renumbered positions.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import AT_THE_DOOR, IN_A_LAYER, IN_LAYERS, LANGUAGE, VIRTUAL, Case, both_attentions, each, renumbers
from references import (
    TIGHT,
    added,
    columns,
    decoded,
    difference,
    full_columns,
    kept_at,
    masked_from,
    numbered,
    scattered,
    sights,
    staged,
    view_of,
    visual,
)
from torch import Tensor, nn
from witness import spied, watching

import jeton
import tiny
from jeton.engine import apply


@torch.no_grad()
@both_attentions
@each(AT_THE_DOOR)
def test_removing_at_the_door_equals_masking(case: Case, attention: str) -> None:
    net = case.net(attention)
    inputs = numbered(net, tiny.inputs_for(net))
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, case.made()), watching(net) as seen:
        logits = tiny.run(net, inputs)
    assert seen.ids is not None and seen.embeds is not None and whole.embeds is not None
    real, length = seen.real(), inputs["input_ids"].shape[1]
    at = columns(seen.ids, full_columns(net, inputs), real)
    assert bool((at[real] >= 0).all())
    embeds, mask = scattered(seen, at, length)
    # text arrives as it was, in its order, and visual tokens in theirs
    text = ~visual(net, inputs) & inputs["attention_mask"].bool()
    assert bool(mask[text].all()) and torch.equal(embeds[text], whole.embeds[text])
    assert all((row[keep].diff() > 0).all() for row, keep in zip(at, real, strict=True))
    ids = inputs["position_ids"]
    deep, types = added(seen, whole, inputs), inputs.get("token_type_ids")
    masked = decoded(net, embeds, mask, ids, deep, types)
    back = masked.gather(1, at.clamp(min=0)[..., None].expand_as(logits))
    assert difference(logits[real], back[real]) < TIGHT
    # the twins: one visual token more, and positions without gaps
    more = mask.clone()
    gone = visual(net, inputs) & (mask == 0)
    first = gone & (gone.cumsum(1) == 1)
    more[first] = 1
    twin = decoded(net, torch.where(first[..., None], whole.embeds, embeds), more, ids, deep, types)
    assert difference(twin[:, -1], back[:, -1]) > 100 * TIGHT
    dense = decoded(net, embeds, mask, (mask.cumsum(1) - 1).clamp(min=0).expand_as(ids), deep, types)
    assert difference(dense[:, -1], back[:, -1]) > 100 * TIGHT


@torch.no_grad()
@each([case for case in AT_THE_DOOR if case.made().site in ("encoder", "entry")])
def test_tokens_that_are_only_kept_arrive_as_they_were(case: Case) -> None:
    """A drop mixes nothing: the embeddings at the door are rows of the unreduced ones."""
    net = case.net()
    inputs = numbered(net, tiny.inputs_for(net))
    with watching(net) as whole:
        tiny.run(net, inputs)
    spy, decided = spied(case.made())
    with apply(net, spy), watching(net) as seen:
        tiny.run(net, inputs)
    at = columns(seen.ids, full_columns(net, inputs), seen.real())
    was = whole.embeds.gather(1, at.clamp(min=0)[..., None].expand_as(seen.embeds))
    off = (was - seen.embeds)[seen.real()].abs().max() / was.abs().max()
    if all(reduction.is_drop for reduction in decided):
        assert off < TIGHT
    else:
        assert off > 100 * TIGHT


# -- inside the language model ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
@both_attentions
@each(IN_A_LAYER)
def test_removing_before_a_layer_equals_masking_from_it_on(case: Case, attention: str, layer: int) -> None:
    net = case.net(attention)
    inputs = numbered(net, tiny.inputs_for(net))
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, replace(case.made(), layer=layer)), watching(net) as seen:
        logits = tiny.run(net, inputs)
    assert [part["hidden"].shape[1] for part in seen.layers[:layer]] == [inputs["input_ids"].shape[1]] * layer
    kept = kept_at(seen, whole, layer, inputs)
    last = logits[:, -1]
    gone = inputs["attention_mask"].bool() & ~kept
    assert bool((gone <= visual(net, inputs)).all()) and bool(gone.any(1).all())
    with masked_from(net, layer, sights(net, inputs, gone)):
        reference = tiny.run(net, inputs)[:, -1]
    assert difference(last, reference) < TIGHT
    for twin_layer, hidden in ((layer - 1, gone), (layer, gone & (gone.cumsum(1) > 1))):
        with masked_from(net, twin_layer, sights(net, inputs, hidden)):
            twin = tiny.run(net, inputs)[:, -1]
        assert difference(twin, reference) > 10 * TIGHT


@torch.no_grad()
@both_attentions
@each(IN_LAYERS)
def test_removing_in_stages_equals_masking_from_each_on(case: Case, attention: str) -> None:
    """Where a stage merges tokens, the reference goes on from what it made."""
    net = case.net(attention)
    inputs = numbered(net, tiny.inputs_for(net))
    with watching(net) as whole:
        tiny.run(net, inputs)
    spy, decided = spied(case.made())
    with apply(net, spy), watching(net) as seen:
        last = tiny.run(net, inputs)[:, -1]
    assert seen.ids is not None
    embeds, mask = scattered(seen, columns(seen.ids, full_columns(net, inputs), seen.real()), inputs["input_ids"].shape[1])
    kept = [kept_at(seen, whole, layer, inputs) for layer in range(len(seen.layers))]
    assert torch.equal(kept[0], mask.bool()) and all(bool((b <= a).all()) for a, b in pairwise(kept))
    stages = [layer for layer in range(1, len(kept)) if not torch.equal(kept[layer], kept[layer - 1])]
    assert stages
    drops = all(reduction.is_drop for reduction in decided)
    deep = added(seen, whole, inputs)
    merged = {} if drops else {layer: seen.layers[layer]["hidden"] for layer in stages}

    def reference(kept: list[Tensor], made: dict[int, Tensor]) -> Tensor:
        gone = [inputs["attention_mask"].bool() & ~each for each in kept]
        masks = [sights(net, inputs, each)[layer] for layer, each in enumerate(gone)]
        with staged(net, masks, kept, made):
            return decoded(net, embeds, mask, inputs["position_ids"], deep, inputs.get("token_type_ids"))[:, -1]

    right = reference(kept, merged)
    assert difference(last, right) < TIGHT
    # the twins: a layer too late, and a layer too early
    late = [kept[layer - (layer in stages)] for layer in range(len(kept))]
    early = [kept[layer + (layer + 1 in stages)] for layer in range(len(kept))]
    assert all(difference(reference(twin, {}), right) > 10 * TIGHT for twin in (late, early))


# -- the other meaning of positions ------------------------------------------------------------------------------------------


@torch.no_grad()
@both_attentions
@each([case for case in AT_THE_DOOR if renumbers(case.model)])
def test_compact_positions_equal_a_prompt_cut_by_hand(case: Case, attention: str) -> None:
    net = case.net(attention)
    inputs = tiny.inputs_for(net)
    inputs = numbered(net, inputs)
    with apply(net, case.made(), positions="compact"), watching(net) as seen:
        logits = tiny.run(net, inputs)
    assert seen.embeds is not None and seen.ids is not None
    real = seen.real()
    ids = (real.long().cumsum(1) - 1).clamp(min=0) + tiny.first(net)
    assert torch.equal(seen.ids[real], ids[real])
    types = inputs.get("token_type_ids")
    types = None if types is None else types[:, : ids.shape[1]]  # all of a prompt of PaliGemma has one type
    assert difference(logits[real], decoded(net, seen.embeds, real.long(), ids, types=types)[real]) < TIGHT


@torch.no_grad()
@each([case for case in IN_A_LAYER if renumbers(case.model)])
def test_compact_positions_inside_the_language_model_begin_at_the_layer(case: Case) -> None:
    """Layers before it see the original positions, it and all later ones those without gaps."""
    net = case.net()
    inputs = numbered(net, tiny.inputs_for(net))
    layer = case.made().layer
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, case.made()), watching(net) as seen:
        tiny.run(net, inputs)
    with apply(net, case.made(), positions="compact"):
        last = tiny.run(net, inputs)[:, -1]
    kept = kept_at(seen, whole, layer, inputs)
    rotary = view_of(net).rotary(whole.embeds, (kept.long().cumsum(1) - 1).clamp(min=0) + tiny.first(net))

    def renumber(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, "position_embeddings": rotary}

    gone = inputs["attention_mask"].bool() & ~kept
    with masked_from(net, layer, sights(net, inputs, gone)):
        twin = tiny.run(net, inputs)[:, -1]
        handles = [part.register_forward_pre_hook(renumber, with_kwargs=True) for part in view_of(net).layers[layer:]]
        reference = tiny.run(net, inputs)[:, -1]
        for handle in handles:
            handle.remove()
    assert difference(last, reference) < TIGHT
    assert difference(twin, reference) > 100 * TIGHT


@each(VIRTUAL)
def test_compact_is_refused_where_merged_tokens_act_at_their_original_positions(case: Case) -> None:
    with pytest.raises(ValueError, match=f"{case.method}.*unmerge=False"):
        apply(case.net(), case.made(), positions="compact").remove()


@pytest.mark.parametrize("name", LANGUAGE)
def test_compact_is_refused_where_positions_are_coordinates_or_windows_count_columns(name: str) -> None:
    net = tiny.model(name)
    if renumbers(name):
        apply(net, "random", positions="compact").remove()
        return
    with pytest.raises(jeton.Unsupported, match='use positions="keep"'):
        apply(net, "random", positions="compact").remove()
