"""Which neurons of a gated MLP a token activates, and the few that a whole prompt shares.

Letters: L tokens, F neurons (gated activations ``act(gate x) * up x``), C core neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLAB = 256


def positive(gated: Tensor, top: float = 1.0) -> Tensor:
    """(B, L, F) bool: the positive activations; with `top` below 1 only that share of each token's, rounded up, the largest."""
    found = gated > 0
    if top == 1.0:
        return found
    parts = []
    for start in range(0, gated.shape[1], SLAB):
        part = gated[:, start : start + SLAB].float()
        here = found[:, start : start + SLAB]
        wanted = torch.ceil(here.sum(2, keepdim=True) * top).long()
        order = part.argsort(dim=2, descending=True, stable=True)
        first = torch.arange(part.shape[2], device=part.device) < wanted
        parts.append(torch.zeros_like(here).scatter(2, order, first))
    return torch.cat(parts, 1)


def counts(active: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, F) how many real tokens activate each neuron; active (B, L, F) bool, real (B, L)."""
    total = torch.zeros(active.shape[0], active.shape[2], dtype=torch.long, device=active.device)
    for start in range(0, active.shape[1], SLAB):
        part = active[:, start : start + SLAB]
        total = total + (part if real is None else part & real[:, start : start + SLAB, None]).sum(1)
    return total


def core(count: Tensor, share: float) -> Tensor:
    """(B, C) the `share` of the neurons that most tokens activate, at least one, ascending; ties to the lowest."""
    wanted = max(1, round(share * count.shape[1]))
    return count.argsort(dim=1, descending=True, stable=True)[:, :wanted].sort(1).values


def overlap(active: Tensor, chosen: Tensor) -> Tensor:
    """(B, N) float32: how many of the chosen neurons (B, F) bool each token's active ones (B, N, F) bool have in common."""
    return (active & chosen[:, None]).sum(2).float()
