"""From 'this token goes into that one' to a `Reduction`.

`into` (B, N) holds for each token the position of the token it merges into: its own if it stays, -1 if it is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Reduction
from .ranking import rank_in_units


def merge(
    into: Tensor,
    k: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    prefix: int = 0,
    ragged: bool = False,
) -> Reduction:
    """The reduction to the k tokens that stay (at most k in each row if `ragged`, the rest masked).

    Each new token is ``sum_n weight[n] x[n]`` over those that went there; without `weight` (B, N) their mean, weighted by
    `size` (B, N) where given.
    """
    n = into.shape[1]
    here = torch.arange(n, device=into.device).expand_as(into)
    stays = into == here
    slot = stays.cumsum(1) - 1
    assign = slot.gather(1, into.clamp(min=0)).masked_fill(into < 0, -1)
    index = slot.new_zeros(slot.shape[0], k + 1).scatter(1, slot.masked_fill(~stays, k), here)[:, :k]
    mask = torch.arange(k, device=into.device) < stays.sum(1, keepdim=True) if ragged else None
    if weight is None:
        weight = mean_weight(assign, k, size)
    return Reduction(index, assign, weight.float().masked_fill(into < 0, 0), mask=mask, prefix=prefix)


def mean_weight(assign: Tensor, k: int, size: Tensor | None = None) -> Tensor:
    """(B, N) ``s / sum of s over the group``; a token alone in its group has exactly 1."""
    size = torch.ones_like(assign, dtype=torch.float32) if size is None else size.float()
    group = assign.masked_fill(assign < 0, k)
    total = size.new_zeros(size.shape[0], k + 1).scatter_add(1, group, size)
    return size / total.gather(1, group)


def add_mean_weight(into: Tensor) -> Tensor:
    """(B, N) weights of VisionZip's rule ``anchor + mean(assigned)``: 1 for tokens that stay, 1 / count for those that go."""
    n = into.shape[1]
    goes = (into != torch.arange(n, device=into.device)) & (into >= 0)
    target = into.masked_fill(~goes, n)
    total = goes.new_zeros(into.shape[0], n + 1, dtype=torch.float32).scatter_add(1, target, goes.float())
    return torch.where(goes, 1 / total.gather(1, target).clamp(min=1), 1.0)


def fold_weight(into: Tensor) -> Tensor:
    """(B, N) weights of the rule ``x <- (x + dropped) / 2``, applied to the dropped tokens in their order: with m of them the one
    that stays has 2^-m, the j-th of them (from 0) 2^(j - m)."""
    n = into.shape[1]
    here = torch.arange(n, device=into.device).expand_as(into)
    goes = (into != here) & (into >= 0)
    group = into.masked_fill(~goes, n)
    fold = rank_in_units(n - here, group, n + 1)
    total = into.new_zeros(into.shape[0], n + 1).scatter_add(1, group, goes.long())
    number = torch.where(goes, fold - total.gather(1, group), -total[:, :n])
    return torch.exp2(number.float()).masked_fill(into < 0, 0)
