"""Which scores stand out among those of their picture: quartiles and the inter-quartile rule, and the local outlier factor.

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


def local_outlier_factor(score: Tensor, neighbours: int, mask: Tensor | None = None) -> Tensor:
    """(B, N) float64: how much sparser the surroundings of each score (B, N) are than those of its nearest scores; 1 is usual.

    With d the distance of two scores, k(o) that of o to its k-th nearest other one and reach(p, o) = max(k(o), d(p, o)):
    density(p) = 1 / mean over the k nearest o of reach(p, o), factor(p) = mean over them of density(o) / density(p). k is
    `neighbours`, or all others of the row where there are fewer. A score has its nearest within k places when sorted, so only
    those are looked at. Ties between neighbours go to the lower score, then to the lower index. Padding gets 1.
    """
    assert score.dim() == 2 and neighbours > 0, f"score {tuple(score.shape)}, neighbours={neighbours}"
    n = score.shape[1]
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    value, order = score.double().masked_fill(~real, torch.inf).sort(dim=1, stable=True)
    inside = torch.arange(n, device=score.device) < real.sum(1, keepdim=True)
    value = value.masked_fill(~inside, 0)
    reach = min(neighbours, n - 1)
    k = (real.sum(1) - 1).clamp(min=0, max=reach)[:, None, None]
    step = torch.cat([torch.arange(-reach, 0, device=score.device), torch.arange(1, reach + 1, device=score.device)])
    place = torch.arange(n, device=score.device)[:, None] + step
    fits = (
        (place >= 0)
        & (place < n)
        & inside.gather(1, place.clamp(0, max(n - 1, 0)).flatten().expand(len(score), -1)).unflatten(1, place.shape)
    )
    place = place.clamp(0, max(n - 1, 0)).expand(len(score), -1, -1)

    def around(x: Tensor) -> Tensor:
        return x.gather(1, place.flatten(1)).unflatten(1, place.shape[1:])

    far, nearest = (around(value) - value[..., None]).abs().masked_fill(~fits, torch.inf).sort(dim=2, stable=True)
    far, nearest = far[..., :reach], nearest[..., :reach]
    counted = torch.arange(reach, device=score.device) < k
    size = k[..., 0].clamp(min=1)
    kth = far.masked_fill(~counted, 0).amax(2) if reach else torch.zeros_like(value)
    far = torch.maximum(around(kth).gather(2, nearest), far).masked_fill(~counted, 0)
    density = 1 / (far.sum(2) / size + 1e-10)
    factor = around(density).gather(2, nearest).masked_fill(~counted, 0).sum(2) / size / density
    factor = torch.where(inside & (k[..., 0] > 0), factor, 1.0)
    return torch.ones_like(factor).scatter(1, order, factor)


def local_outliers(
    score: Tensor, neighbours: int, threshold: float = 1.5, upper_only: bool = False, mask: Tensor | None = None
) -> Tensor:
    """(B, N) true where the local outlier factor is above `threshold`; `upper_only`: and the score above the row's median."""
    found = local_outlier_factor(score, neighbours, mask) > threshold
    if upper_only:
        one = torch.zeros_like(score, dtype=torch.long)
        found = found & (score.float() > quantile(score, 0.5, one, 1, mask))
    return found if mask is None else found & mask
