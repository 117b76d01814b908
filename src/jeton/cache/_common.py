"""What caches need to know of a model: where its layers are, and how it rotates queries and keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Unsupported


class Rotary:
    """A model's own rotary embedding, at any positions and back."""

    def __init__(self, module: nn.Module, apply: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.module, self.apply = module, apply

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """States (B, H, L, d) rotated to `positions` (L,)."""
        cos, sin = self.module(x, positions[None])
        return self.apply(x, x, cos, sin)[0]

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """States that were rotated to `positions`, as they were before."""
        cos, sin = self.module(x, positions[None])
        scale = float(getattr(self.module, "attention_scaling", 1.0))  # some kinds lengthen what they rotate
        return self.apply(x, x, cos, -sin)[0] / scale**2


class Decoder:
    """View of a causal language model, or of the one in a vision-language model. rotary is None where positions are biases."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = getattr(model, "base_model", model)
        base = getattr(base, "language_model", base)
        self.model: nn.Module = base
        layers = next((found for name in ("layers", "h", "blocks") if (found := getattr(base, name, None)) is not None), None)
        if layers is None:
            raise Unsupported(f"{type(model).__name__} does not show its decoder layers where transformers' decoders do.")
        self.layers = list(layers)
        self.rotary = self._rotary(model)

    def _rotary(self, model: nn.Module) -> Rotary | None:
        module = getattr(self.model, "rotary_emb", None)
        if module is None:
            if hasattr(self.model, "wpe") or hasattr(self.model, "embed_positions"):
                raise Unsupported(
                    f"{type(model).__name__} adds learned positions to its embeddings, so cached tokens cannot be moved; this "
                    "needs rotary positions or biases (ALiBi)."
                )
            return None
        if getattr(self.model.config, "rope_parameters", None) and "mrope_section" in self.model.config.rope_parameters:
            raise Unsupported(
                f"{type(model).__name__} numbers positions by time, height and width, which cannot be counted anew in the cache."
            )
        apply = getattr(sys.modules[type(self.model).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise Unsupported(f"{type(model).__name__} does not show how it applies its rotary embedding.")
        return Rotary(module, apply)


def arange(start: int, stop: int, like: Tensor) -> Tensor:
    return torch.arange(start, stop, device=like.device)
