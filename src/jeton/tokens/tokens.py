"""Tokens on their way through a model, with all that is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..place import Place


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through a model.

    features: (B, N, D). mask: (B, N) true where the token is real, None when all are. index: (B, N) original index of each
    token, None for 0..N-1. size: (B, N) how many originals each token stands for, None for 1. prefix: how many special tokens
    (class, registers) stand in front; no method reduces those. place: the geometry, where it is known. order: (B, N) rank of
    each token in the listing of the published method, None where the tokens stand in that order already. score: (B, N) a score
    that a method carries from block to block, None where it carries none. memory: (B, ...) whatever else a method carries, which
    reductions leave alone. policy: (B, N) in training only, the weight with which later blocks see each token (0: masked); None
    for 1.
    """

    features: Tensor
    mask: Tensor | None = None
    index: Tensor | None = None
    size: Tensor | None = None
    prefix: int = 0
    place: Place | None = None
    order: Tensor | None = None
    score: Tensor | None = None
    memory: Tensor | None = None
    policy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.dim() != 3:
            raise ValueError(f"Tokens.features must be (B, N, D), got {tuple(self.features.shape)}.")
        for name in ("mask", "index", "size", "order", "score", "policy"):
            value = getattr(self, name)
            if value is not None and value.shape != self.features.shape[:2]:
                raise ValueError(f"Tokens.{name} must be {tuple(self.features.shape[:2])}, got {tuple(value.shape)}.")

    def __len__(self) -> int:
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def real(self) -> Tensor:
        """(B, N) true where the token is real."""
        return self.mask if self.mask is not None else self.features.new_ones(self.features.shape[:2], dtype=torch.bool)

    @property
    def origin(self) -> Tensor:
        """(B, N) original index of each token."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self), device=self.device).expand(self.features.shape[0], -1)

    @property
    def weight(self) -> Tensor:
        """(B, N) float32: how many originals each token stands for."""
        if self.size is not None:
            return self.size
        return torch.ones(self.features.shape[:2], dtype=torch.float32, device=self.device)

    def count(self) -> Tensor:
        """(B,) number of real tokens."""
        return self.real.sum(1)

    @property
    def seen(self) -> Tensor:
        """(B, N) float32: the weight with which each token is seen; padding is not."""
        return self.real.float() if self.policy is None else self.policy
