"""Who is like whom within a picture: how many near twins a token has, and which kept token is nearest to it.

Cosine similarity in float32, a slab of rows at a time, so that no N x N map is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .similarity import normalise

_SLAB = 256


def twins(x: Tensor, threshold: float, unit: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) how many other tokens of the same unit have a cosine above `threshold` with each token of x (B, N, d)."""
    here = torch.arange(x.shape[1], device=x.device)
    parts = []
    for rows, near in _slabs(x):
        same = _same_unit(unit, rows, mask) & (here[rows][:, None] != here)
        parts.append(((near > threshold) & same).sum(2))
    return torch.cat(parts, 1)


def nearest(x: Tensor, anchor: Tensor, unit: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) position of the most similar token among the anchors (B, N) of the same unit, lowest on ties; -1 if it has none."""
    parts = []
    for rows, near in _slabs(x):
        fits = _same_unit(unit, rows, mask) & anchor[:, None, :]
        best = near.masked_fill(~fits, -torch.inf).max(2)
        parts.append(best.indices.masked_fill(best.values == -torch.inf, -1))
    return torch.cat(parts, 1)


def _slabs(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    unit = normalise(x)
    for start in range(0, x.shape[1], _SLAB):
        rows = slice(start, min(start + _SLAB, x.shape[1]))
        yield rows, unit[:, rows] @ unit.mT


def _same_unit(unit: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
    same = unit[:, rows, None] == unit[:, None, :]
    return same if mask is None else same & mask[:, None, :] & mask[:, rows, None]
