"""FoPru: focal pruning by the attention each patch receives, patch by patch or row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..needs import Need
from ..ops.budget import count, counts, split, unit_sizes
from ..ops.lines import best_of_lines
from ..ops.outliers import outliers
from ..ops.selection import pack, top_k
from ..tokens import Reduction, Tokens
from ._common import attention, check_score, score_of


@register(
    title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
    year=2024,
    source="arXiv:2411.14164",
    family="vlm",
    stage="encoder",
    headline="accuracy nearly unchanged on most sets with 25 % of the tokens",
)
@dataclass(frozen=True)
class FoPru(Method):
    """Keep the K patches that receive most attention in the block whose output the model uses; or whole rows of them.

    score s (B, N) = attention each patch receives, averaged over queries and heads (`score` "class": what the class token gives
    it). `select` "rank" keeps the K highest. "row" takes whole rows of the picture, by the mean of s over the row, highest first;
    the last row that fits only in part gives its best tokens (`partial_row`), so that K is met exactly, or none. Kept tokens
    stand in their original order.

    `scope` "image": all tokens of an image compete, and the rows are those of the stitched crops and of the thumbnail; "crop":
    each picture has its share of K by size, and its own rows. `outlier_clip` leaves attention sinks aside: patches above
    Q3 + outlier_clip (Q3 - Q1) of their picture come last; None keeps them. No code is published: the reading of "significance"
    as received attention (over all queries, the class token's among them), `scope` and `outlier_clip` are ours.
    """

    site = "encoder"
    keep: int | float = 0.25
    select: str = "rank"
    score: str = "received"
    scope: str = "image"
    partial_row: bool = True
    outlier_clip: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_score(self.score)
        for name, value, known in (("select", self.select, ("rank", "row")), ("scope", self.scope, ("image", "crop"))):
            if value not in known:
                raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", got {value!r}.')
        if self.outlier_clip is not None and not self.outlier_clip >= 0:
            raise ValueError(f"outlier_clip, a factor of Q3 - Q1, must be 0 or more, or None, got {self.outlier_clip}.")

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score = score_of(signals, "attention", "fopru")
        place, mask, aside = tokens.place, tokens.mask, self._sinks(score, tokens)
        if self.select == "rank":
            score = score if aside is None else score.masked_fill(aside, -torch.inf)
            return top_k(score, self.keep, mask, place if self.scope == "crop" else None)
        if place is None:
            raise ValueError('fopru(select="row") needs to know the rows of the picture: give Tokens a place.')
        stitched = self.scope == "image"
        sizes = unit_sizes(place.unit, place.units, mask)
        sizes = sizes.sum(1, keepdim=True) if stitched else sizes
        quota = split(counts(self.keep, sizes.sum(1)), sizes)
        chosen = best_of_lines(score, place, quota, mask, aside, stitched, self.partial_row)
        return pack(chosen, count(self.keep, len(tokens)), ragged=mask is not None or not self.partial_row)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=self.select == "rank" or self.partial_row)

    def _sinks(self, score: Tensor, tokens: Tokens) -> Tensor | None:
        if self.outlier_clip is None:
            return None
        place = tokens.place
        unit, units = (torch.zeros_like(tokens.origin), 1) if place is None else (place.unit, place.units)
        return outliers(score, unit, units, self.outlier_clip, tokens.mask)
