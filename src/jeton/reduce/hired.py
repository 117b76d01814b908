"""HiRED: the thumbnail decides how many tokens each high-resolution crop may keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, ClassAttention, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import allocate, count, counts, split, unit_sizes
from ..ops.selection import best_of_units, pack, top_k
from ..place import Place
from ..tokens import Reduction, Tokens
from ._common import score_of


@register(
    title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in "
    "Resource-Constrained Environments",
    year=2024,
    source="arXiv:2408.10945",
    family="vlm",
    stage="encoder",
    headline="LLaVA-NeXT-7B with 20 % of the tokens: 4.7 times the throughput",
)
@dataclass(frozen=True)
class HiRED(Method):
    """Share a fixed budget between thumbnail and crops by early attention; within each, keep the best by late attention.

    Of the total K the thumbnail takes floor(alpha K). Its floor(N (1 - alpha)) tokens with most class attention in the first
    block are counted by the crop in whose region they lie, and crops share the rest of K in proportion to the counts. Within
    the thumbnail and each crop the tokens with most attention from their own class token, at the block whose output the model
    uses, stay. A single picture keeps its best K; several without a thumbnail (frames) share K by their sizes.

    With `redistribute` what rounding and full crops leave over is given on (largest remainder), so K is met exactly; without,
    it is lost, as published. `reference_strips` counts in contiguous strips of the flattened thumbnail, as the released code
    does, instead of the crops' true regions.
    """

    site = "encoder"
    newlines = "drop"
    keep: int | float = 0.2
    alpha: float = 0.5
    redistribute: bool = True
    reference_strips: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha, the thumbnail's share of the budget, must lie in [0, 1], got {self.alpha!r}.")

    def needs(self) -> dict[str, Need]:
        return {"early": ClassAttention(layer=0), "late": ClassAttention(layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        late, place, mask = score_of(signals, "late", "hired"), tokens.place, tokens.mask
        if place is None or place.units == 1:
            return top_k(late, self.keep, mask)
        sizes = unit_sizes(place.unit, place.units, mask)
        total = counts(self.keep, sizes.sum(1))
        quota = split(total, sizes)
        if place.crop_rows is not None:
            salient = self._salient(score_of(signals, "early", "hired"), place, sizes, mask)
            crops = self._shared(total, sizes, unit_sizes(self._region(place), place.units, salient))
            quota = torch.where(self._cropped(place, sizes), crops, quota)
        chosen = best_of_units(late, place.unit, quota, mask)
        return pack(chosen, count(self.keep, len(tokens)), ragged=mask is not None or not self.redistribute)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=self.redistribute)

    def _salient(self, early: Tensor, place: Place, sizes: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N) the thumbnail's tokens with most attention in the first block."""
        share = torch.zeros_like(sizes)
        share[:, 0] = _floor(sizes[:, 0] * (1 - self.alpha))
        return best_of_units(early, place.unit, share, mask)

    def _cropped(self, place: Place, sizes: Tensor) -> Tensor:
        """(B, 1) true where a row is a thumbnail and its crops, not a single picture or frames (whose crop grid is 1 x 1)."""
        rows, cols = _crop_grid(place)
        pictures = (sizes > 0).sum(1, keepdim=True)
        return (pictures > 1) & ((rows * cols > 1) | ((rows * cols == 1) & (pictures == 2)))

    def _region(self, place: Place) -> Tensor:
        """(B, N) for each thumbnail token the unit of the crop it lies in; crop (r, c) is unit 1 + r C + c."""
        rows, cols = _crop_grid(place)
        height, width = place.height.clamp(min=1), place.width.clamp(min=1)  # padding may have none
        if self.reference_strips:
            region = (place.row * width + place.col) * (rows * cols) // (height * width)
        else:
            region = (place.row * rows // height) * cols + place.col * cols // width
        return (1 + region).clamp(min=0, max=place.units - 1)

    def _shared(self, total: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
        """(B, U) budget of the thumbnail and of each crop, from what is counted in each (`weight`)."""
        caps = sizes.clone()
        caps[:, 0] = 0
        thumbnail = torch.minimum(_floor(total * self.alpha), sizes[:, 0])
        if self.redistribute:
            thumbnail = torch.maximum(thumbnail, total - caps.sum(1))
            crops = allocate(weight.masked_fill(caps == 0, 0), total - thumbnail, caps)
        else:
            rest = torch.minimum(total - thumbnail, caps.sum(1))[:, None]
            crops = (weight * rest // weight.sum(1, keepdim=True).clamp(min=1)).minimum(caps)
        return torch.cat([thumbnail[:, None], crops[:, 1:]], 1)


def _crop_grid(place: Place) -> tuple[Tensor, Tensor]:
    """(B, 1) rows and columns of the crops."""
    assert place.crop_rows is not None and place.crop_cols is not None
    return place.crop_rows.amax(1, keepdim=True), place.crop_cols.amax(1, keepdim=True)


def _floor(x: Tensor) -> Tensor:
    return (x.double() + 1e-9).floor().long()
