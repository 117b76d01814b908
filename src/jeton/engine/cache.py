"""The cache once the prompt has run: layers let go of tokens that later layers have dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..method import Method
from .aside import aside
from .flow import Kept
from .prompt import Prompt


class CacheSite:
    """From layer `first` on caches end up with the columns that are left in the last layer; what comes later joins all of
    them."""

    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        depth = len(prompt.view.layers)
        asked = [layer for method in methods if (layer := method.shrinks(depth)) is not None]
        self.prompt, self.depth, self.first = prompt, depth, min(asked, default=None)
        if self.first is not None and not 1 <= self.first < depth:
            raise ValueError(
                f"caches can shrink from layer 1 to {depth - 1} on, not from layer {self.first}: layer 0 counts the positions."
            )

    def attach(self) -> None:
        if self.first is not None:
            self.prompt.run.hook(self.prompt.view.decoder.register_forward_pre_hook(self._before, with_kwargs=True))
            self.prompt.run.hook(self.prompt.view.decoder.register_forward_hook(self._after, with_kwargs=True))

    @aside
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.prompt.flow is not None and kwargs.get("past_key_values") is not None:
            self._check(kwargs["past_key_values"])

    def _check(self, cache: Any) -> None:
        plain = (DynamicLayer, DynamicSlidingWindowLayer) if self.prompt.view.windowed else (DynamicLayer,)
        strange = {type(layer).__name__ for layer in cache.layers if type(layer) not in plain}
        if strange:
            raise ValueError(
                f"{self.prompt.run.spec} shrinks the cache after the prompt, which jeton does in a DynamicCache of plain layers; "
                f"this one has {', '.join(sorted(strange))}. Leave out cache_implementation, or set shrink=False."
            )

    @aside
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        prompt, memory = self.prompt, self.prompt.memory
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        final = memory.held(self.depth - 1)
        if prompt.flow is None or cache is None or final is None:
            return
        self._check(cache)
        assert self.first is not None
        with prompt.run.clock.measure("selection"):
            index: dict[int, Tensor] = {}
            for number in range(self.first, self.depth):
                own = memory.held(number)
                if own is final:
                    break
                if id(own) not in index:
                    index[id(own)] = _within(own, final, prompt.total)
                _keep(cache.layers[number], index[id(own)], prompt.total - (0 if own is None else own.offset))
            kept = {layer: one if layer < self.first else final for layer, one in memory.layers.items()}
            memory.layers = {**kept, self.first: final}


def _within(own: Kept | None, final: Kept, total: int) -> Tensor:
    """(B, n) where the columns of `final` stand among those of `own` (all if None); both are columns of the entrance, which holds
    `total`."""
    wanted = final.columns(total)
    if own is None:
        return wanted
    columns = own.columns(total)
    place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    return torch.zeros_like(columns[:, :1]).expand(-1, total).scatter(1, columns, place).gather(1, wanted)


def _keep(held: Any, at: Tensor, total: int) -> None:
    """Let a layer's cache hold the columns at (B, k) of its `total` alone. One with a window holds the last columns only: those
    it has lost lie beyond the window for good, so that any key may stand in for them."""
    if isinstance(held, DynamicSlidingWindowLayer):
        held.cumulative_length = at.shape[1]
        at = (at - (total - held.keys.shape[2])).clamp(min=0)[:, -held.sliding_window + 1 :]
    held.keys, held.values = (_picked(states, at) for states in (held.keys, held.values))


def _picked(states: Tensor, at: Tensor) -> Tensor:
    """Keys or values (B, H, n, d) at the columns (B, k)."""
    return states.gather(2, at[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
