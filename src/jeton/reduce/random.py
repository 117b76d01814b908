"""Random pruning: the baseline every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..ops.selection import noise, top_k
from ..tokens import Reduction, Tokens


@register(title="Random pruning (control)", year=2026, source="control", family="control", stage="encoder")
@dataclass(frozen=True)
class Random(Method):
    """Keep a random subset, uniform over subsets of the budget's size.

    The j-th real token of a row draws u_j = hash(seed, j); the K largest stay. The draw depends on nothing else: not on the
    batch, not on the global random state. `seed` chooses another subset.
    """

    site = "encoder"
    keep: int | float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}.")

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        draw = noise(n, self.seed, tokens.device).expand(b, n)
        if tokens.mask is not None:
            draw = torch.gather(draw, 1, (tokens.mask.cumsum(1) - 1).clamp(min=0))
        return top_k(draw, self.keep, tokens.mask)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n))
