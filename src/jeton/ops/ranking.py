"""Ranks: the place of each entry in descending order, in a row or within the units of a row. Ties go to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor


def rank(score: Tensor) -> Tensor:
    """(B, N) place of each entry of `score` (B, N), 0 for the largest."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, place)


def rank_in_units(score: Tensor, unit: Tensor, units: int) -> Tensor:
    """(B, N) place of each entry among its own unit (B, N), 0 for the largest; two stable sorts, no loop over units."""
    by_score = score.argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, unit.gather(1, by_score).argsort(dim=1, stable=True))
    sizes = unit.new_zeros(unit.shape[0], units).scatter_add(1, unit, torch.ones_like(unit))
    first = (sizes.cumsum(1) - sizes).gather(1, unit.gather(1, order))
    here = torch.arange(score.shape[1], device=score.device)
    return torch.empty_like(order).scatter(1, order, here - first)


def spearman(scores: Tensor) -> Tensor:
    """(S, S) Spearman's correlation between the rows of `scores` (S, N); equal values share their mean rank."""
    below = (scores[:, :, None] > scores[:, None]).sum(2)
    shared = (scores[:, :, None] >= scores[:, None]).sum(2)
    return torch.corrcoef((below + shared).double())
