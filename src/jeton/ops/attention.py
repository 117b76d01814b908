"""Attention looked at from the side: the rows a method asks for, rebuilt from queries and keys in float32.

The model keeps its own fast attention. Letters: Hq query heads, Hk key heads (Hq a multiple of Hk), R query rows, N keys,
d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    logits: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """(B, Hq, R, N) float32: ``softmax(q kᵀ · scale + mask)`` for q (B, Hq, R, d) and k (B, Hk, N, d).

    `mask` is as for scaled_dot_product_attention (true where attended, or added to the logits), broadcastable to (B, Hq, R, N).
    `scale` is d^-1/2 if not given. With `logits` the softmax is left out. `softcap` c bends logits z, in front of the mask,
    to ``c · tanh(z / c)``. Keys shared by several query heads are not copied.
    """
    b, hq, r, d = q.shape
    hk = k.shape[1]
    assert hq % hk == 0 and k.shape[3] == d, f"heads or widths do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}"
    scale = d**-0.5 if scale is None else scale
    grouped = (q.float() * scale).reshape(b, hk, (hq // hk) * r, d)
    scores = (grouped @ k.float().mT).reshape(b, hq, r, k.shape[2])
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    if mask is not None:
        here = torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape  # else it has more heads
        if mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask, -torch.inf) if here else scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores.add_(mask.float()) if here else scores + mask.float()
    return scores if logits else scores.softmax(-1)


def drawn(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """The whole map, as `rows` gives it; where nothing is to be differentiated it is never in memory twice."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return rows(q, k, scale, mask)
    whole = rows(q, k, scale, mask, logits=True)
    heads = whole.flatten(0, 1)
    for part in heads.split(-(-len(heads) // 8)):
        part.copy_(part.softmax(-1))
    return whole


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    """(B, Hq, R, d) values v (B, Hk, N, d) mixed by weights (B, Hq, R, N); values shared by several heads are not copied."""
    grouped = weights.reshape(v.shape[0], v.shape[1], -1, v.shape[2])
    return (grouped @ v).reshape(*weights.shape[:3], v.shape[3])


def received_in(weights: Tensor) -> Tensor:
    """(B, N) the attention each token receives in a map (B, H, N, N), averaged over queries and heads."""
    return weights.mean((1, 2))


def received(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    slab: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """(B, N) float32: the attention each token receives, averaged over all real queries and heads; q and k over the same N.

    `mask` (B, N) is true where a token is real. `bias`, broadcastable to (B, H, N, N), is what attention itself was masked with.
    Queries are taken `slab` at a time, so no N x N map is stored.
    """
    n = q.shape[2]
    queries = n if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    return _given(q, k, scale, mask, mask, slab, bias) / queries


def anchored(
    q: Tensor,
    k: Tensor,
    threshold: float,
    scale: float | None = None,
    mask: Tensor | None = None,
    slab: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """(B, N) float32: the attention each token receives from the anchors, averaged over them and over heads.

    Anchors receive more than `threshold` times the mean of `received`; where none does, all real tokens are anchors. Two passes,
    `slab` queries at a time.
    """
    score = received(q, k, scale, mask, slab, bias)
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    mean = score.masked_fill(~real, 0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    anchor = real & (score > threshold * mean)
    anchor = torch.where(anchor.any(1, keepdim=True), anchor, real)
    return _given(q, k, scale, mask, anchor, slab, bias) / anchor.sum(1, keepdim=True).clamp(min=1)


def _given(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    mask: Tensor | None,
    queries: Tensor | None,
    slab: int,
    bias: Tensor | None = None,
) -> Tensor:
    """(B, N) the attention that the queries (B, N) give to each token, summed over them and averaged over heads."""
    b, h, n, _ = q.shape
    total = torch.zeros(b, n, dtype=torch.float32, device=q.device)
    keys = None if mask is None else mask[:, None, None, :]
    for start in range(0, n, slab):
        part = rows(q[:, :, start : start + slab], k, scale, _joined(keys, bias, start, slab))
        if queries is not None:  # where, not times: a row without any real key is NaN
            part = part.masked_fill(~queries[:, None, start : start + slab, None], 0)
        total = total + part.sum((1, 2))
    return total / h


def _joined(keys: Tensor | None, bias: Tensor | None, start: int, slab: int) -> Tensor | None:
    """The mask of one slab of queries: real keys and what attention was masked with."""
    if bias is None:
        return keys
    part = bias if bias.shape[2] == 1 else bias[:, :, start : start + slab]
    if keys is None:
        return part
    return part & keys if part.dtype == torch.bool else part.float().masked_fill(~keys, -torch.inf)


def bias(size: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 1, 1, N): log(size), to be added to the logits so that a token standing for s originals counts s times as a key."""
    assert size.dim() == 2, f"size must be (B, N), got {tuple(size.shape)}"
    return size.float().log()[:, None, None, :].to(dtype)
