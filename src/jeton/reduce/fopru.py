"""FoPru: focal pruning by the attention each patch receives, patch by patch or row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import count, counts, split, unit_sizes
from ..ops.grid import line_means
from ..ops.outliers import outliers
from ..ops.ranking import rank_in_units
from ..ops.selection import pack, top_k
from ..place import Place
from ..tokens import Reduction, Tokens
from ._common import attention, check_score, score_of


@register(
    title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
    year=2024,
    source="arXiv:2411.14164",
    family="vlm",
    stage="encoder",
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
    as received attention, `scope` and `outlier_clip` are ours.
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
            raise ValueError(f"outlier_clip must be a factor of the inter-quartile range, 0 or more, or None, got {self.outlier_clip}.")

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score = score_of(signals, "attention", "fopru")
        place, mask = tokens.place, tokens.mask
        sink = None
        if self.outlier_clip is not None:
            unit = torch.zeros_like(tokens.origin) if place is None else place.unit
            sink = outliers(score, unit, 1 if place is None else place.units, self.outlier_clip, mask)
        if self.select == "row":
            if place is None:
                raise ValueError('fopru(select="row") needs to know the rows of the picture: give Tokens a place.')
            return self._rows(score, place, mask, sink)
        score = score if sink is None else score.masked_fill(sink, -torch.inf)
        return top_k(score, self.keep, mask, place if self.scope == "crop" else None)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=self.select == "rank" or self.partial_row)

    def _rows(self, score: Tensor, place: Place, mask: Tensor | None, sink: Tensor | None) -> Reduction:
        """Tokens in the order of their row's mean, then of their own score; the first K of them stay."""
        n, units = score.shape[1], place.units if self.scope == "crop" else 1
        real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
        own = (place.unit.clamp(min=0) if units > 1 else torch.zeros_like(place.unit)).masked_fill(~real, units)
        line, mean = line_means(score, place, stitched=self.scope == "image", mask=real if sink is None else real & ~sink)
        by_line = rank_in_units(mean.gather(1, line), own, units + 1)  # ties go to the lowest index: a line may be torn apart
        first = by_line.new_full(mean.shape, n).scatter_reduce(1, line, by_line.masked_fill(~real, n), "amin")
        alone = score if sink is None else score.masked_fill(sink, -torch.inf)
        within = rank_in_units(alone, own, units + 1)
        place_in_unit = rank_in_units(-(first.gather(1, line) * (n + 1) + within), own, units + 1)
        sizes = unit_sizes(own, units + 1)[:, :units]
        quota = split(counts(self.keep, sizes.sum(1)), sizes)
        if not self.partial_row:
            end = by_line.new_zeros(mean.shape).scatter_reduce(1, line, place_in_unit.masked_fill(~real, -1), "amax") + 1
            limit = torch.nn.functional.pad(quota, (0, 1)).gather(1, own)
            whole = unit_sizes(own, units + 1, (end.gather(1, line) <= limit) & real)[:, :units]
            quota = torch.where(whole > 0, whole, quota)
        chosen = place_in_unit < torch.nn.functional.pad(quota, (0, 1)).gather(1, own)
        return pack(chosen, count(self.keep, n), ragged=mask is not None or not self.partial_row)
