"""The attention tap: sees every attention call of a model after RoPE, without replacing its fast attention.

A model's attention implementation is swapped, for the time of a run, for a registered twin that looks up the calling module.
Modules nobody listens to go straight through; others may record signals from q and k, or have a bias per key added to the mask.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .aside import aside

PREFIX = "jeton_"


class Listener:
    """What a tapped attention module answers to; a module may have several."""

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """A (B, 1, 1, N) additive bias per key, or None."""
        return None

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        """Take what is needed from q (B, H, R, d), k and v (B, Hk, N, d)."""

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Any:
        """What stands in for this call's result, made with `attention(q, k, v, mask)`; None to leave the call alone."""
        return None


Attention = Callable[[Tensor, Tensor, Tensor, Any], Any]
LISTENERS = "_jeton_listeners"  # on the module itself: where nobody listens, a compiled model sees so without a break


class Taps:
    """The taps of one run: which modules are heard, and the implementations to put back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.heard: list[nn.Module] = []
        self.saved: list[tuple[Any, str | None]] = []

    def listen(self, attention: nn.Module, listener: Listener) -> None:
        for module in attention.modules():
            module.__dict__.setdefault(LISTENERS, []).append(listener)
            self.heard.append(module)

    def open(self) -> None:
        """Swap the attention implementation of every configuration in the model for its tapped twin."""
        if not self.heard:
            return
        seen = set()
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if config is None or id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
                continue
            seen.add(id(config))
            current = config._attn_implementation_internal
            self.saved.append((config, current))
            if current is not None and not current.startswith(PREFIX):
                config._attn_implementation_internal = twin(current)

    def close(self) -> None:
        for config, current in reversed(self.saved):
            config._attn_implementation_internal = current
        for module in self.heard:
            module.__dict__.pop(LISTENERS, None)
        self.saved.clear()
        self.heard.clear()


def twin(implementation: str) -> str:
    """The name of the tapped twin of an attention implementation, registered on first use with the same mask function."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _tapped(implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _tapped(implementation: str) -> Callable:
    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **extra: Any) -> Any:
        original = _original(module, implementation)
        listeners = getattr(module, LISTENERS, None)
        if listeners is None:
            return original(module, query, key, value, attention_mask, **extra)
        attention = functools.partial(original, module, **extra)
        attention_mask, made = _told(listeners, attention, query, key, value, attention_mask, extra)
        return attention(query, key, value, attention_mask) if made is None else made

    return forward


@aside
def _told(
    listeners: list[Listener], attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Any, extra: dict[str, Any]
) -> tuple[Any, Any]:
    """The mask with the listeners' bias, and what stands in for the call's result, if anything."""
    scale = extra.get("scaling") or query.shape[-1] ** -0.5
    for listener in listeners:
        bias = listener.bias(query, key)
        if bias is not None:
            mask = add_bias(mask, bias)
    for listener in listeners:
        listener.record(query, key, value, mask, scale, extra)
    for listener in listeners:
        made = listener.attend(attention, query, key, value, extra)
        if made is not None:
            return mask, made
    return mask, None


def _original(module: nn.Module, implementation: str) -> Callable:
    """The implementation itself; eager attention lives in the module of each family's modeling file."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask with `bias` (B, 1, 1, N) per key on top of a boolean, additive or absent mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return mask + bias
