"""Who may look at whom, where layers of a language model do not simply look back: windows that slide, blocks that see each other.

Such masks count columns. So they are made for the columns of the whole conversation, by the model's own rule, and what is left is
taken from them afterwards: a window reaches as far as it did, a block stays a block, and removing a token equals masking it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from ..tokens import gather
from .aside import aside
from .prompt import Prompt

Masks = dict[str, Tensor | None]


class Whole:
    """How rules for masks see a cache: it holds the `past` columns of the conversation, all of them, in every layer."""

    is_sliding: tuple[bool, ...] = ()
    is_compileable = False

    def __init__(self, cache: Any, past: int) -> None:
        self.cache, self.past = cache, past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + query_length, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def is_wide(mask: Any) -> bool:
    """True for masks that say for every query what it may look at: (B, 1, new, total), or one for each kind of layer."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


def made(decoder: nn.Module, embeds: Tensor, mask: Tensor | None, past: int) -> Masks | Tensor | None:
    """The masks a language model would make itself for the columns `embeds` after `past` others; mask: (B, past + new)."""
    made: Masks | Tensor | None = create_masks_for_generate(
        config=decoder.config,  # type: ignore[arg-type]
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=Whole(None, past),  # type: ignore[arg-type]
        position_ids=None,
    )
    return made


def taken(masks: Any, rows: Tensor | None, columns: Tensor, real: Tensor | None, new: int) -> Any:
    """Of wide masks (or None, where a kernel is left to look back by itself) the query rows (B, n) of the new columns, all `new`
    if None, and the key columns (B, total'); those that are not `real` (B, total') are hidden."""
    if isinstance(masks, dict):
        return {kind: taken(mask, rows, columns, real, new) for kind, mask in masks.items()}
    if masks is None:
        return None if real is None else hidden(looking_back(new if rows is None else rows.shape[1], columns), real)
    mask = masks.expand(columns.shape[0], -1, -1, -1)
    if rows is not None:
        mask = gather(mask.transpose(1, 2), rows).transpose(1, 2)
    mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    return mask if real is None else hidden(mask, real)


def looking_back(rows: int, columns: Tensor) -> Tensor:
    """(1, 1, rows, keys) the causal mask of the last `rows` of the columns (B, keys)."""
    keys = columns.shape[1]
    return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=columns.device).tril(keys - rows)


def hidden(mask: Tensor, real: Tensor) -> Tensor:
    """A boolean or additive mask (B, 1, q, n) with padding columns hidden; every row may see itself, so that none is empty."""
    rows, keys = mask.shape[-2:]
    at = torch.arange(keys, device=mask.device)
    own = at == (at[:rows, None] + keys - rows)
    hide = ~real.bool()[:, None, None] & ~own
    return mask & ~hide | own if mask.dtype == torch.bool else mask.masked_fill(hide, torch.finfo(mask.dtype).min)


class WindowSite:
    """Layers that see a window cache its length only: their masks, made for all columns, are cut to the keys that are there.

    A window of W columns holds at most W - 1 earlier ones, however many of them are left, so the cache lacks none of them."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def attach(self) -> None:
        if self.prompt.view.windowed:
            for number, layer in enumerate(self.prompt.view.layers):
                self.prompt.run.hook(layer.register_forward_pre_hook(self._in_front(number), with_kwargs=True))

    @staticmethod
    def _in_front(number: int) -> Any:
        @aside
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            if not is_wide(mask):
                return None
            keys = mask.shape[2] + held(cache, number)
            return (args, {**kwargs, "attention_mask": mask[..., -keys:]}) if keys < mask.shape[3] else None

        return hook


def held(cache: Any, number: int) -> int:
    """How many earlier columns a layer of a cache hands out."""
    layer = None if cache is None or number >= len(cache.layers) else cache.layers[number]
    if layer is None or layer.keys is None or layer.keys.numel() == 0:
        return 0
    window = getattr(layer, "sliding_window", None)
    length: int = layer.keys.shape[2]
    return length if window is None else min(length, window - 1)
