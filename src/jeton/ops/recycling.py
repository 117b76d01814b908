"""Recycling: the least important tokens are gathered into one per group instead of being dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Reduction
from .merging import merge
from .ranking import rank, rank_in_units


def recycle(score: Tensor, label: Tensor, budget: Tensor, k: int, mask: Tensor | None = None) -> Reduction:
    """Leave `budget` (B, 1) tokens, at most k in a row: the best by `score` (B, N), and one for each group that the others form.

    `label` (B, N), below N, names the groups. So many of the lowest tokens are gathered that survivors and groups add up to the
    budget. A group becomes its mean, weighted by score (evenly where none is above zero), in the place of its best token. Where
    the budget is below the number of labels, nobody survives, and the groups with the best tokens stay. Ties go to the lowest
    index; padding, where `mask` is false, takes no part.
    """
    n = score.shape[1]
    real = torch.ones_like(label, dtype=torch.bool) if mask is None else mask
    score = score.float().clamp(min=torch.finfo(torch.float32).min).masked_fill(~real, -torch.inf)
    count = real.sum(1, keepdim=True)
    gathered = _gathered(score, label, real, count, budget)
    group = torch.where(gathered, label, n)
    best = gathered & (rank_in_units(score.masked_fill(~gathered, -torch.inf), group, n + 1) == 0)
    here = torch.arange(n, device=score.device).expand_as(label)
    leader = label.new_zeros(len(label), n + 1).scatter(1, torch.where(best, label, n), here)
    stays = real & (best | ~gathered)
    stays = stays & (rank(score.masked_fill(~stays, -torch.inf)) < budget)
    target = torch.where(gathered, leader.gather(1, group), here)
    into = torch.where(real & stays.gather(1, target), target, -1)
    weight = score.clamp(min=0)
    empty = weight.new_zeros(len(label), n).scatter_add(1, target, weight).gather(1, target) <= 0
    return merge(into, k, size=torch.where(empty, 1.0, weight), ragged=mask is not None)


def _gathered(score: Tensor, label: Tensor, real: Tensor, count: Tensor, budget: Tensor) -> Tensor:
    """(B, N) true for the tokens that go into groups: each of them but the lowest of its group makes one token fewer, so they go,
    lowest first, until count - budget of these others are among them."""
    n = score.shape[1]
    group = torch.where(real, label, n)
    size = label.new_zeros(len(label), n + 1).scatter_add(1, group, torch.ones_like(label)).gather(1, group)
    other = real & (rank_in_units(score, group, n + 1) < size - 1)
    from_below = torch.where(real, count - 1 - rank(score), n)
    sorted_other = label.new_zeros(len(label), n + 1).scatter(1, from_below, other.long())
    earlier = sorted_other.cumsum(1) - sorted_other
    return real & (earlier.gather(1, from_below) < count - budget)
