"""How many scores stand out from the rest: the point of a falling curve that lies farthest from its chord."""

from __future__ import annotations

import torch
from torch import Tensor


def elbow(score: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, 1) rank of the elbow of the scores (B, N), sorted to fall, and the score there.

    The chord runs from the first to the last real score, x being the rank; the elbow is the rank with the largest perpendicular
    distance to it, the first on ties (rank 0 for a straight line).
    """
    assert score.dim() == 2, f"score must be (B, N), got {tuple(score.shape)}"
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    y = score.double().masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).values
    last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
    rank = torch.arange(y.shape[1], device=y.device)
    fall = y.gather(1, last) - y[:, :1]
    # the chord's length is the same for all ranks, so the numerator alone decides; rounded, so that a straight line has no elbow
    off = (fall * rank - last * (y - y[:, :1])).abs()
    off = torch.where(rank <= last, off, -1.0)
    scale = (fall.abs() * last).clamp(min=1e-300)
    at = ((off / scale) * 2**40).round().argmax(1, keepdim=True)
    return at, y.gather(1, at).to(score.dtype)


def elbow_keep(score: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) true for scores strictly above the elbow's; where none is (equal scores), all real tokens."""
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    above = (score > elbow(score, mask)[1]) & real
    return torch.where(above.any(1, keepdim=True), above, real)


def elbow_count(score: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, 1) how many tokens `elbow_keep` keeps."""
    return elbow_keep(score, mask).sum(1, keepdim=True)
