"""Pruning weights by weight and activation (Wanda), and comparing what was pruned. A mask is true where a weight goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]


def prune(weight: Tensor, norm: Tensor, ratio: float) -> Tensor:
    """(O, I) bool: in each row of weight (O, I) the floor(ratio I) entries with the lowest ``|W_ij| ‖x_j‖``, norm (I,); on ties
    the first."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio!r} must be the share of weights to prune, from 0 to 1.")
    worth = weight.detach().float().abs() * norm.float()
    order = worth.argsort(dim=1, stable=True)[:, : int(ratio * weight.shape[1] + 1e-9)]
    return torch.zeros_like(worth, dtype=torch.bool).scatter(1, order, True)


def iou(a: Masks, b: Masks) -> float:
    """Weights both masks prune over those that either does; 1 if neither prunes any."""
    _same(a, b)
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return both / either if either else 1.0


def combine(masks: Sequence[Masks], how: str = "or") -> dict[str, Tensor]:
    """One mask of several: pruned by any ("or"), by all ("and"), or by the first and none of the others ("difference")."""
    if how not in ("or", "and", "difference"):
        raise ValueError(f'how must be "or", "and" or "difference", got {how!r}.')
    if not masks:
        raise ValueError("there are no masks to combine.")
    out = dict(masks[0])
    for other in masks[1:]:
        _same(out, other)
        for name, mask in other.items():
            out[name] = out[name] | mask if how == "or" else out[name] & (mask if how == "and" else ~mask)
    return out


def _same(a: Masks, b: Masks) -> None:
    if set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        raise ValueError(f"the masks are of different models: only one of them has {', '.join(odd[:3])}.")
