"""Evenly spaced tokens: the baseline without randomness."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..ops.selection import evenly_spaced
from ..tokens import Reduction, Tokens


@register(title="Uniform stride (control)", year=2026, source="control", family="control", stage="encoder")
@dataclass(frozen=True)
class Uniform(Method):
    """Keep K of N tokens at even distances in the order they stand: token floor((i + 1/2) N / K) for i = 0..K-1."""

    site = "encoder"
    keep: int | float = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        return evenly_spaced(n, self.keep, b, tokens.device, tokens.mask)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n))
