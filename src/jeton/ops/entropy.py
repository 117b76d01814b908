"""How many tokens a distribution over them lets go."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_count(share: Tensor, real: Tensor, target: Tensor, remaining: int) -> Tensor:
    """(B, 1) long: ``round((N - T) / sqrt(R) (1 - (H / ln N)^2))`` tokens to cut, few where `share` is spread out.

    share (B, n): a distribution over the N = `real` (B, 1) tokens of each row, zero elsewhere; H its entropy. T = `target`
    (B, 1), R = `remaining` steps still to come, at least 1. A row of one token cuts nothing.
    """
    entropy = torch.special.entr(share).sum(1, keepdim=True)
    spread = entropy / real.clamp(min=2).to(share.dtype).log()
    return ((real - target).clamp(min=0) / remaining**0.5 * (1 - spread.square())).round().long().clamp(min=0)
