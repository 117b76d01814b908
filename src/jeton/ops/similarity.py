"""Cosine similarity, in float32 whatever comes in."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., D) in float32 with rows of length one; a zero row stays zero instead of dividing by zero."""
    return F.normalize(x.float(), dim=-1, eps=eps)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, M) cosine of every row of a (B, N, D) with every row of b (B, M, D)."""
    assert a.dim() == 3 and b.dim() == 3, f"cosine takes (B, N, D) and (B, M, D), got {tuple(a.shape)} and {tuple(b.shape)}"
    return normalise(a) @ normalise(b).mT


def to_first(x: Tensor, metric: str = "cosine") -> Tensor:
    """(B, N) how like the first row of x (B, N, D) every row is, itself included: their cosine (0 for a zero row), or the mean
    absolute ("l1") or squared ("l2") difference of channels, negated."""
    first = x[:, :1]
    if metric == "cosine":
        return (normalise(first) * normalise(x)).sum(-1)
    difference = x.float() - first.float()
    return -(difference.abs() if metric == "l1" else difference.square()).mean(-1)
