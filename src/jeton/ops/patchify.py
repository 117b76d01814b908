"""Patch embeddings for patches of another size."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def resample(kernel: Tensor, patch: int) -> Tensor:
    """A patch embedding (D, C, P, P) for patches of `patch` x `patch` pixels (D, C, p, p), by the pseudo-inverse of resizing
    (FlexiViT, arXiv:2212.08013): where a larger patch is a smaller one enlarged bilinearly, both give the same product; where
    patches become smaller, the products of smaller patches with it are as near as they can be."""
    if kernel.shape[-2] != kernel.shape[-1]:
        raise ValueError(f"patches must be square, got a kernel {tuple(kernel.shape)}.")
    old = kernel.shape[-1]
    if old == patch:
        return kernel
    inverse = _inverse(old, patch).to(kernel.device)
    return (kernel.double().flatten(2) @ inverse).to(kernel.dtype).unflatten(-1, (patch, patch))


@lru_cache(maxsize=32)
def _inverse(old: int, new: int) -> Tensor:
    """(old², new²) the pseudo-inverse of the matrix that resizes a patch of old² pixels to new²."""
    unit = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resize = F.interpolate(unit, (new, new), mode="bilinear", align_corners=False, antialias=new < old).flatten(1)
    return torch.linalg.pinv(resize).mT.contiguous()


def resize_positions(table: Tensor, grid: tuple[int, int], front: int, back: int = 0) -> Tensor:
    """A position table (1, front + N + back, D) of a square grid for another grid: the patches' part bicubic, that of special
    tokens in front and behind as it was."""
    inner = table[:, front : table.shape[1] - back]
    side = round(inner.shape[1] ** 0.5)
    if side * side != inner.shape[1]:
        raise ValueError(f"{inner.shape[1]} positions are no square grid.")
    square = inner.mT.unflatten(-1, (side, side)).float()
    new = F.interpolate(square, grid, mode="bicubic", align_corners=False).flatten(2).mT.to(table.dtype)
    return torch.cat([table[:, :front], new, table[:, table.shape[1] - back :]], 1)
