"""Which scores stand out among those of their picture: quartiles and the inter-quartile rule.

Letters: U units (pictures in a row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import unit_sizes
from .ranking import rank_in_units


def quantile(score: Tensor, q: float, unit: Tensor, units: int, mask: Tensor | None = None) -> Tensor:
    """(B, U) the q-quantile of the scores (B, N) of each unit, interpolated linearly; 0 for a unit without tokens."""
    assert score.shape == unit.shape, f"score {tuple(score.shape)} and unit {tuple(unit.shape)} differ"
    real = torch.ones_like(unit, dtype=torch.bool) if mask is None else mask
    score = score.float().masked_fill(~real, 0)
    own = unit.clamp(min=0).masked_fill(~real, units)  # padding stands in a unit of its own
    sizes = unit_sizes(own, units + 1)
    place = rank_in_units(-score, own, units + 1)
    position = q * (sizes - 1).clamp(min=0).double()
    low = position.floor().long()
    high = position.ceil().long()

    def value(wanted: Tensor) -> Tensor:
        here = torch.where(place == wanted.gather(1, own), score, 0)
        return score.new_zeros(sizes.shape).scatter_add(1, own, here)

    below = value(low)
    return (below + (position - low).float() * (value(high) - below))[:, :units]


def upper_fence(score: Tensor, unit: Tensor, units: int, factor: float = 1.5, mask: Tensor | None = None) -> Tensor:
    """(B, U) ``Q3 + factor (Q3 - Q1)``: a score above it is an outlier of its unit."""
    first, third = (quantile(score, q, unit, units, mask) for q in (0.25, 0.75))
    return third + factor * (third - first)


def outliers(score: Tensor, unit: Tensor, units: int, factor: float = 1.5, mask: Tensor | None = None) -> Tensor:
    """(B, N) true for scores above the upper fence of their unit."""
    found = score.float() > upper_fence(score, unit, units, factor, mask).gather(1, unit.clamp(min=0))
    return found if mask is None else found & mask
