"""PageRank on causal attention: where mass ends up that starts everywhere and follows attention a few times.

Letters: B prompts, H heads, L tokens, T rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pagerank(rows: Callable[[int, int], Tensor], start: Tensor, heads: int, rounds: int, block: int = 128) -> Tensor:
    """(B, H, L) float32: ``p <- p M`` done `rounds` times from `start` (B, L), for M lower triangular.

    ``rows(begin, stop)`` gives rows begin..stop of M, (B, H, stop - begin, stop). Nothing flows to a token from one before it,
    so blocks of rows are taken from the last to the first, each once, with all rounds of its tokens: no L x L map is stored.
    """
    assert start.dim() == 2 and rounds >= 0 and block > 0, f"start {tuple(start.shape)}, rounds={rounds}, block={block}"
    b, n = start.shape
    p = torch.zeros(b, heads, rounds + 1, n, dtype=torch.float32, device=start.device)
    p[:, :, 0] = start[:, None]
    for stop in range(n, 0, -block):
        begin = max(0, stop - block)
        m, own = rows(begin, stop), slice(begin, stop)
        for done in range(rounds):
            p[:, :, done + 1, own] += (p[:, :, done : done + 1, own] @ m[..., own])[:, :, 0]
        p[:, :, 1:, :begin] += p[:, :, :-1, own] @ m[..., :begin]
    return p[:, :, -1]


def importance(p: Tensor) -> Tensor:
    """(B, L) ``sqrt(mean over heads of p²)`` for p (B, H, L)."""
    return p.square().mean(1).sqrt()
