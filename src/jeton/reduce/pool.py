"""Average pooling on the grid, to any exact number of cells."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..ops.budget import count, shares, unit_sizes
from ..ops.grid import cells, central
from ..ops.merging import merge
from ..tokens import Reduction, Tokens


@register(title="Grid average pooling (control)", year=2026, source="control", family="control", stage="encoder")
@dataclass(frozen=True)
class Pool(Method):
    """Cut the picture's grid (h, w) into exactly K rectangles and average each.

    There are about sqrt(K h / w) rows of cells; each holds its share of the K, rounded down or up, so cells of neighbouring
    rows may differ in width by one. Several pictures in a row share K in proportion to their tokens. Each cell is represented
    by its most central token.
    """

    site = "encoder"
    keep: int | float = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        if tokens.place is None:
            raise ValueError(
                "pool averages cells of the picture's grid, but these tokens have no place; use uniform or divprune."
            )
        k = count(self.keep, n)
        if k == n and tokens.mask is None:
            return Reduction.identity(b, n, tokens.device)
        quota = shares(self.keep, "image", unit_sizes(tokens.place.unit, tokens.place.units, tokens.mask))
        label, off = cells(tokens.place, quota, tokens.mask)
        return merge(central(label, off, k), k, tokens.size, ragged=tokens.mask is not None)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n))
