"""What the unreduced model computes where it should agree with a reduced one, and how results are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from witness import Replay, Seen, match, shown, watching

import tiny
from jeton.engine import apply
from jeton.method import Method
from jeton.models import VisionLanguage, adapt
from jeton.tokens import Reduction

TIGHT, CLOSE = 1e-5, 1e-4  # one forward; a forward against another way of computing it
STEPS = 16


def visual(net: nn.Module, inputs: tiny.Inputs) -> Tensor:
    """(B, L) true where a prompt holds visual tokens."""
    return (inputs["input_ids"] == tiny.IMAGE) | (inputs["input_ids"] == tiny.VIDEO)


def runs_of_images(inputs: tiny.Inputs, sample: int) -> list[int]:
    """Visual tokens of each image of a prompt, read from the prompt itself."""
    ids, counts, last = inputs["input_ids"][sample].tolist(), [], -1
    for token in ids:
        if token in tiny.INSIDE:
            continue
        if token in (tiny.IMAGE, tiny.VIDEO):
            counts.append(1) if token != last else counts.__setitem__(-1, counts[-1] + 1)
        last = token
    return counts


def numbered(net: nn.Module, inputs: tiny.Inputs) -> tiny.Inputs:
    return {**inputs, "position_ids": tiny.positions(net, inputs)}


def columns(ids: Tensor, full: Tensor, real: Tensor) -> Tensor:
    """(B, n) which column of the whole prompt each column with these position ids is; -1 for padding."""
    if ids.dim() == 2:
        ids, full = ids[None], full[None]
    found = match(ids.permute(1, 2, 0), full.permute(1, 2, 0))
    return torch.where(real, found, -1)


def full_columns(net: nn.Module, inputs: tiny.Inputs) -> Tensor:
    """Position ids of the whole prompt with padding marked, so that it matches nothing."""
    ids = tiny.positions(net, inputs)
    return ids.masked_fill(~inputs["attention_mask"].bool(), -7)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def decoded(
    net: nn.Module, embeds: Tensor, mask: Tensor, ids: Tensor, deep: Sequence[Tensor] = (), types: Tensor | None = None
) -> Tensor:
    """Logits of the unreduced language model for embeddings, a 2-D mask and position ids; `deep` (B, L, D) each is added behind
    its first layers; types: `token_type_ids`, where the whole model makes the masks."""
    more: dict[str, Any] = {}
    if types is not None:
        return net(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, token_type_ids=types).logits
    if deep:
        everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool)
        more = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [level.flatten(0, 1) for level in deep]}
    output = view_of(net).decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, **more)
    return net.lm_head(output.last_hidden_state)


def scattered(seen: Seen, at: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What arrived, put back where it stood in the prompt; and a mask of those columns."""
    assert seen.embeds is not None
    spare = torch.where(at < 0, length, at)
    embeds = seen.embeds.new_zeros(at.shape[0], length + 1, seen.embeds.shape[-1])
    embeds = embeds.scatter(1, spare[..., None].expand_as(seen.embeds), seen.embeds)
    mask = torch.zeros(at.shape[0], length + 1, dtype=torch.long).scatter(1, spare, 1)
    return embeds[:, :length], mask[:, :length]


def layer_columns(seen: Seen, whole: Seen, layer: int, inputs: tiny.Inputs) -> Tensor:
    """(B, n) which column of the whole prompt each column in front of `layer` is, by its rotary embedding; -1 for padding."""
    here, there = (torch.cat(each.layers[layer]["rotary"], -1) for each in (seen, whole))
    batch = inputs["input_ids"].shape[0]
    real = inputs["attention_mask"].bool()
    at = match(here.expand(batch, -1, -1), there.expand(batch, -1, -1).masked_fill(~real[..., None], torch.nan))
    mask = seen.layers[layer]["mask"]
    if mask is None:
        return at
    return torch.where(shown(mask).expand(batch, -1), at, -1)


def added(seen: Seen, whole: Seen, inputs: tiny.Inputs) -> list[Tensor]:
    """(B, L, D) for each of the first layers what was added behind it, at the columns of the whole prompt."""
    batch, length = inputs["input_ids"].shape
    levels = []
    for layer, deep in enumerate(seen.deep):
        at = layer_columns(seen, whole, layer, inputs)
        spare = torch.where(at < 0, length, at)[..., None].expand_as(deep)
        levels.append(deep.new_zeros(batch, length + 1, deep.shape[-1]).scatter(1, spare, deep)[:, :length])
    return levels


def kept_at(seen: Seen, whole: Seen, layer: int, inputs: tiny.Inputs) -> Tensor:
    """(B, L) the columns of the whole prompt that entered `layer`."""
    batch, length = inputs["input_ids"].shape
    at = layer_columns(seen, whole, layer, inputs)
    kept = torch.zeros(batch, length + 1, dtype=torch.bool)
    return kept.scatter(1, torch.where(at < 0, length, at), True)[:, :length]


# -- the language model alone, with a mask instead of a reduction --------------------------------------------------------------


def causal(inputs: tiny.Inputs, hidden: Tensor | None = None) -> Tensor:
    """(B, 1, L, L) additive mask; `hidden` (B, L) are columns nobody but themselves may look at."""
    length = inputs["input_ids"].shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    if hidden is not None:
        allowed = allowed & ~hidden[:, None, None]
    allowed = allowed | torch.eye(length, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@torch.no_grad()
def sights(net: nn.Module, inputs: tiny.Inputs, hidden: Tensor) -> list[Tensor]:
    """For each layer of the unreduced model the (B, 1, L, L) additive mask it was given, or would have been, with `hidden` (B, L)
    columns that nobody but themselves may look at."""
    with watching(net) as whole:
        tiny.run(net, inputs)
    length = inputs["input_ids"].shape[1]
    back = torch.ones(1, 1, length, length, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    found = []
    for layer in whole.layers:
        mask = layer["mask"]
        allowed = back if mask is None else mask if mask.dtype == torch.bool else mask == 0
        allowed = allowed & ~hidden[:, None, None] | torch.eye(length, dtype=torch.bool)
        found.append(torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min))
    return found


@contextmanager
def masked_from(net: nn.Module, layer: int, masks: list[Tensor]) -> Iterator[None]:
    """The unreduced model whose layers from `layer` on see these masks."""

    def hook(mask: Tensor) -> Any:
        def change(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": mask}

        return change

    parts = list(zip(view_of(net).layers, masks, strict=True))[layer:]
    handles = [part.register_forward_pre_hook(hook(mask), with_kwargs=True) for part, mask in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def view_of(net: nn.Module) -> VisionLanguage:
    seen = adapt(net)
    assert isinstance(seen, VisionLanguage)
    return seen


@contextmanager
def staged(net: nn.Module, masks: list[Tensor], kept: list[Tensor], made: dict[int, Tensor]) -> Iterator[None]:
    """The unreduced model whose layers see these masks, and into which some layers' kept columns are written."""

    def hook(layer: int) -> Any:
        def change(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer in made:
                short = made[layer].shape[1]
                hidden = hidden.clone()
                for sample, columns in enumerate(kept[layer]):
                    hidden[sample, columns] = made[layer][sample, short - int(columns.sum()) :]
            changed = {**kwargs, "attention_mask": masks[layer]}
            return ((hidden, *args[1:]), changed) if args else (args, {**changed, "hidden_states": hidden})

        return change

    handles = [part.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, part in enumerate(view_of(net).layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- generation ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generated(net: nn.Module, inputs: tiny.Inputs, **how: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return net.generate(**inputs, **{**settings, **how})


def recomputed(net: nn.Module, inputs: tiny.Inputs, method: Method, decided: list[Reduction], new: Tensor) -> Tensor:
    """(B, T, V) logits that predict each token of `new` (B, T), in one forward without a cache and with the same kept sets."""
    longer = tiny.extended(inputs, new[:, :-1])
    longer["position_ids"] = tiny.positions(net, longer)
    with apply(net, Replay(method, list(decided))):
        return tiny.run(net, longer, use_cache=False)[:, -new.shape[1] :]
