"""DivPrune: keep a subset that is spread out."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..ops.selection import max_min_diverse
from ..tokens import Reduction, Tokens


@register(
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    year=2025,
    source="arXiv:2503.02175",
    family="vlm",
    stage="entry",
    headline="best average over 16 image and video sets at high pruning ratios",
)
@dataclass(frozen=True)
class DivPrune(Method):
    """Keep the K tokens whose smallest pairwise distance is, greedily, largest. It reads neither attention nor text.

    With D_ij = 1 - cos(x_i, x_j) over the projected tokens (B, N, D): first the token whose nearest other token is farthest,
    then always argmax_j min_{s chosen} D_sj, lowest index on ties; a token is never chosen twice. All tokens of an image, crops
    and newlines included, stand in one pool.
    """

    site = "entry"
    newlines = "pool"
    keep: int | float = 0.098

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return max_min_diverse(tokens.features, self.keep, tokens.mask)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n))
