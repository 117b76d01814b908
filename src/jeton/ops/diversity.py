"""How alike the rows of an attention map are."""

from __future__ import annotations

import torch
from torch import Tensor


def likeness(attention: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean over batch and queries of the cosine between each row of attention (B, H, N, N), averaged over heads, and the mean
    row, both cut to what exceeds twice the uniform share 2 / N. 0 where either has nothing left. O(N^2)."""
    rows = attention.float().mean(1)
    threshold = 2 / rows.shape[-1]
    mean = rows.mean(1, keepdim=True)
    rows, mean = (torch.where(x > threshold, x, 0) for x in (rows, mean))
    norms = rows.square().sum(-1).clamp(min=eps**2).sqrt() * mean.square().sum(-1).clamp(min=eps**2).sqrt()
    return ((rows * mean).sum(-1) / norms).mean()
