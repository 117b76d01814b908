"""Rotary positions: how a state rotated to one position is brought to another, and scores of states that stand at several.

A rotation by p and then by q is one by p + q, so a state that was rotated to p0 reaches p by the rotation p - p0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def between(cos: Tensor, sin: Tensor, cos0: Tensor, sin0: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation from the position of cos0 and sin0 to that of cos and sin, all (..., d); a scale that a model
    puts on its rotary embeddings is not applied again."""
    square = (cos0.square() + sin0.square()).clamp(min=torch.finfo(cos.dtype).tiny)
    return (cos * cos0 + sin * sin0) / square, (sin * cos0 - cos * sin0) / square


def bias(q: Tensor, k: Tensor, floor: float = 0.01) -> Tensor:
    """(..., R, N) the share of a product that its positions alone give: q (..., R, d), k (..., N, d) are rotated vectors of ones.

    At a distance of p it is the mean of cos(p f) over the rotary frequencies f: 1 at no distance, less further away. Far enough
    away it may swing around zero, where it says nothing to divide by: it is at least `floor`."""
    return (q.float() @ k.float().mT / q.shape[-1]).clamp(min=floor)


def expanded_scores(q: Tensor, k: Tensor, owner: Tensor, angle: Tensor) -> Tensor:
    """(..., N, N) products of q and k (..., n, d), not rotated yet, each repeated at all places whose `owner` (N,) it is and
    rotated there by `angle` (N, d/2); the first half of the d entries is rotated with the second."""
    return _rotated(q[..., owner, :], angle) @ _rotated(k[..., owner, :], angle).mT


def trigonometric_scores(q: Tensor, k: Tensor, owner: Tensor, angle: Tensor) -> Tensor:
    """The same scores without rotating anything at full length:
    ``sum_d (C_i C_j + S_i S_j)_d A_d + (C_i S_j - S_i C_j)_d B_d`` with A = q1 k1 + q2 k2 and B = q2 k1 - q1 k2 of the n merged
    states, C and S the cosines and sines at the N places. A and B hold n^2 d / 2 numbers a head: fewer products, more memory."""
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    a = q1[..., :, None, :] * k1[..., None, :, :] + q2[..., :, None, :] * k2[..., None, :, :]
    b = q2[..., :, None, :] * k1[..., None, :, :] - q1[..., :, None, :] * k2[..., None, :, :]
    cos, sin = angle.cos(), angle.sin()
    even = cos[:, None] * cos[None] + sin[:, None] * sin[None]
    odd = cos[:, None] * sin[None] - sin[:, None] * cos[None]
    pairs = (..., owner[:, None], owner[None, :], slice(None))
    return (even * a[pairs] + odd * b[pairs]).sum(-1)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
