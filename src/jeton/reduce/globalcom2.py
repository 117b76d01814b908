"""GlobalCom²: the thumbnail commands how many tokens each high-resolution crop keeps, and helps to say which."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, ClassAttention, Method, Need, Promise, ReceivedAttention, Signals, check_keep, register
from ..ops.budget import allocate, count, counts, split, unit_sizes
from ..ops.crops import block_sums, crop_grid, cropped, enlarged
from ..ops.selection import best_of_units, pack, top_k
from ..place import Place
from ..tokens import Reduction, Tokens
from ._common import check_score, score_of


@register(
    title="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language Models",
    year=2025,
    source="arXiv:2501.05179",
    family="vlm",
    stage="encoder",
    headline="over 90 % of performance with 10 % of the tokens, 9.1 % of the FLOPs",
)
@dataclass(frozen=True)
class GlobalCom2(Method):
    """Share the budget between crops by the thumbnail's scores in each one's region; rank by local and global scores together.

    score (B, N) = mean over heads of the class token's attention before softmax (logits, which may be negative). The thumbnail
    keeps the share R = K / N of its tokens. Its scores summed over the region of crop p are s_p; w = softmax(s / temperature);
    the crop keeps the share min(1, R (1 + w_p - mean(w))) of its real tokens. There a token's rank is by
    ``local / |local| + g / |g|``: its own score and the thumbnail's at the same spot, stretched bilinearly over the real part of
    the stitched crops, each divided by its length over the crop. Newlines stay. A single picture keeps its best K; frames share
    K by their sizes.

    With `redistribute` K is met exactly (the thumbnail rounds, crops take the rest by largest remainder); without, all counts are
    rounded down, as published. Kept tokens of the thumbnail stand in spatial order; the released code leaves them by descending
    score, scores every image of a batch by the first one's thumbnail, and reads the tower's very last block. `layer` -1 is the
    block whose output the model uses, one before that. `score` "received" is for encoders without a class token; it adds up to 1
    over a picture, so a temperature of 10 leaves all crops nearly alike: set one near 0.1.
    """

    site = "encoder"
    keep: int | float = 0.25
    temperature: float = 10.0
    layer: int = -1
    score: str = "class"
    redistribute: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_score(self.score)
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}.")

    def needs(self) -> dict[str, Need]:
        if self.score == "received":
            return {"attention": ReceivedAttention(layer=self.layer)}
        return {"attention": ClassAttention(layer=self.layer, logits=True)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score, place, mask = score_of(signals, "attention", "globalcom2"), tokens.place, tokens.mask
        if place is None or place.units == 1:
            return top_k(score, self.keep, mask)
        sizes = unit_sizes(place.unit, place.units, mask)
        total = counts(self.keep, sizes.sum(1))
        quota = split(total, sizes)
        if place.crop_rows is not None:
            under = cropped(place, sizes)
            quota = torch.where(under, self._quota(block_sums(score, place, mask), place, sizes, total), quota)
            seen = _unit_length(score, place, mask) + _unit_length(enlarged(score, place, mask), place, mask)
            score = torch.where(under & (place.unit > 0), seen, score)
        chosen = best_of_units(score, place.unit, quota, mask)
        return pack(chosen, count(self.keep, len(tokens)), ragged=mask is not None or not self.redistribute)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=self.redistribute)

    def _quota(self, sums: Tensor, place: Place, sizes: Tensor, total: Tensor) -> Tensor:
        """(B, U) tokens of the thumbnail and of each crop, from the thumbnail's score in each crop's region (B, U)."""
        rows, cols = crop_grid(place)
        unit = torch.arange(place.units, device=sums.device)
        exact = total[:, None].double() / sizes.sum(1, keepdim=True).clamp(min=1)
        ratio = torch.full_like(exact, self.keep) if isinstance(self.keep, float) else exact
        wanted = sizes * crop_ratios(sums, (unit > 0) & (unit <= rows * cols), ratio, self.temperature)
        thumbnail = sizes[:, :1] * ratio
        if not self.redistribute:
            return (torch.cat([thumbnail, wanted[:, 1:]], 1) + 1e-9).floor().long()
        caps = sizes.masked_fill(unit == 0, 0)
        first = torch.minimum(thumbnail.round().long(), sizes[:, :1]).minimum(total[:, None])
        first = torch.maximum(first, total[:, None] - caps.sum(1, keepdim=True))
        return torch.cat([first, allocate(wanted.masked_fill(caps == 0, 0), total - first[:, 0], caps)[:, 1:]], 1)


def crop_ratios(sums: Tensor, crop: Tensor, ratio: Tensor | float, temperature: float = 10.0) -> Tensor:
    """(B, U) share of its tokens each crop keeps: ``min(1, ratio (1 + w - mean(w)))`` with w = softmax(sums / temperature) over
    the units that are crops (B, U). Without clipping their mean is `ratio`."""
    weight = (sums.double() / temperature).masked_fill(~crop, -torch.inf).softmax(1)
    mean = 1 / crop.sum(1, keepdim=True).clamp(min=1).double()
    return (ratio * (1 + weight - mean)).clamp(min=0, max=1).masked_fill(~crop, 0)


def _unit_length(score: Tensor, place: Place, mask: Tensor | None) -> Tensor:
    """Scores (B, N) with the scores of each unit as a vector of length one."""
    own = place.unit.clamp(min=0)
    real = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    squares = score.new_zeros(score.shape[0], place.units).scatter_add(1, own, score.masked_fill(~real, 0).square())
    return score / squares.sqrt().gather(1, own).clamp(min=1e-12)
