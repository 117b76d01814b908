"""The attention tap: sees every attention call of a model after RoPE, without replacing its fast attention.

A model's attention implementation is swapped, for the time of a run, for a registered twin that looks up the calling module.
Modules nobody listens to go straight through; others may record signals from q and k, or have a bias per key added to the mask.
Modules that call torch's `scaled_dot_product_attention` themselves (timm) are heard there, whatever else they do around it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .aside import aside

PREFIX = "jeton_"


class Listener:
    """What a tapped attention module answers to; a module may have several."""

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """An additive bias (B, 1, 1, N) per key or (B, H, N, N) per pair, or None."""
        return None

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        """Take what is needed from q (B, H, R, d), k and v (B, Hk, N, d)."""

    def attend(
        self, original: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
    ) -> Any:
        """What stands in for this call's result, made with `original(q, k, v, mask)` or a pair of (B, N, H, d) and weights, under
        the call's own mask with all biases added; None to leave the call alone."""
        return None


Attention = Callable[[Tensor, Tensor, Tensor, Any], Any]
LISTENERS = "_jeton_listeners"  # on the module itself: where nobody listens, a compiled model sees so without a break


class Taps:
    """The taps of one run: which modules are heard, and the implementations to put back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.heard: list[nn.Module] = []
        self.saved: list[tuple[Any, str | None]] = []
        self.stood_in: list[tuple[nn.Module, dict[str, Any]]] = []

    def listen(self, attention: nn.Module, listener: Listener, functional: bool = False) -> None:
        """Hear an attention module; `functional` ones call torch's function themselves."""
        for module in attention.modules():
            module.__dict__.setdefault(LISTENERS, []).append(listener)
            self.heard.append(module)
        if functional and all(module is not attention for module, _ in self.stood_in):
            own = {name: attention.__dict__[name] for name in ("forward", "fused_attn") if name in attention.__dict__}
            self.stood_in.append((attention, own))
            attention.forward = _overheard(attention, attention.forward, own.get("fused_attn", True))  # type: ignore[method-assign]
            if "fused_attn" in own:  # timm's other branch multiplies by hand, where nothing is heard: `_by_hand` does so here
                attention.fused_attn = True

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
        for module, own in self.stood_in:
            module.__dict__.pop("forward", None)
            module.__dict__.update(own)
        self.stood_in.clear()
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
        scale = extra.get("scaling") or query.shape[-1] ** -0.5
        attention_mask, made = _told(listeners, attention, query, key, value, attention_mask, scale, extra)
        return attention(query, key, value, attention_mask) if made is None else made

    return forward


@aside
def _told(
    listeners: list[Listener],
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float,
    extra: dict[str, Any],
) -> tuple[Any, Any]:
    """One attention call's mask with its listeners' bias, and what stands in for its result, if anything."""
    for listener in listeners:
        bias = listener.bias(query, key)
        if bias is not None:
            mask = add_bias(mask, bias)
    for listener in listeners:
        listener.record(query, key, value, mask, scale, extra)
    for listener in listeners:
        made = listener.attend(attention, query, key, value, mask, extra)
        if made is not None:
            return mask, made
    return mask, None


def _overheard(module: nn.Module, forward: Callable, fused: bool) -> Callable:
    @aside
    @functools.wraps(forward)
    def overheard(*args: Any, **kwargs: Any) -> Any:
        with _Overhearing(getattr(module, LISTENERS, []), scaled_dot_product_attention if fused else _by_hand):
            return forward(*args, **kwargs)

    return overheard


class _Overhearing(TorchFunctionMode):
    """Hears the calls of `scaled_dot_product_attention` made while it is active, and has them done by `done_by`. Those of
    `nn.MultiheadAttention` get the listeners' bias per key alone."""

    def __init__(self, listeners: list[Listener], done_by: Callable[..., Tensor]) -> None:
        super().__init__()
        self.listeners, self.done_by = listeners, done_by

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is multi_head_attention_forward:
            return func(*args, **self._padded(kwargs, *args[:2]))
        return self._attend(*args, **kwargs) if func is scaled_dot_product_attention else func(*args, **kwargs)

    def _padded(self, kwargs: dict[str, Any], query: Tensor, key: Tensor) -> dict[str, Any]:
        """The arguments of one call for query (L, B, D) and key (N, B, D), with the bias as a mask of its keys."""
        given = kwargs.get("key_padding_mask")
        for listener in self.listeners:
            bias = listener.bias(query.transpose(0, 1)[:, None], key.transpose(0, 1)[:, None])
            if bias is not None:
                given = add_bias(given, bias[:, 0, 0])
        return {**kwargs, "key_padding_mask": given}

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if is_causal:  # a mask of its own and a bias on top do not go together
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
            done = self.done_by(q, k, v, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
            return done.transpose(1, 2), None  # as transformers' attention functions give it

        size = query.shape[-1] ** -0.5 if scale is None else scale
        extra = {"scaling": size, "dropout": dropout_p}
        mask, made = _told(self.listeners, attention, query, key, value, attn_mask, size, extra)
        return (attention(query, key, value, mask) if made is None else made)[0].transpose(1, 2)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Attention as timm writes it where it is not to be fused."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return dropout(scores.softmax(dim=-1), dropout_p, training=dropout_p > 0) @ v


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
