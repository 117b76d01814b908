"""What the pixels of patches say before any encoder has looked at them: how much they vary, their grey values and entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def variance(patches: Tensor) -> Tensor:
    """(...) float32: unbiased variance of patches (..., C, V) over their V values, averaged over the C channels."""
    return patches.float().var(-1).mean(-1)


def cut(pixels: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) as patches (B, N, C, size²), row by row; what is left over at the right and below is left out."""
    channels = pixels.shape[1]
    return F.unfold(pixels, size, stride=size).unflatten(1, (channels, size * size)).permute(0, 3, 1, 2)


def grey(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey values (..., P) in 0..255, whole numbers, of normalised pixels (..., C, P) with C = 3 (red, green, blue) or 1."""
    channels = pixels.shape[-2]
    shape = (channels, 1)
    scale, shift = (torch.tensor(tuple(x)[:channels], device=pixels.device).reshape(shape) for x in (std, mean))
    colour = (pixels.float() * scale + shift).clamp(0, 1)
    weight = torch.tensor(LUMA if channels == 3 else (1.0,), device=pixels.device).reshape(shape)
    return (255 * (colour * weight).sum(-2)).round().long().clamp(0, 255)


def entropy(values: Tensor, bins: int = 256) -> Tensor:
    """(..., ) float32: -sum p log2 p of the histogram of each (P,) of `values` (..., P), whole numbers below `bins`."""
    count = torch.zeros(*values.shape[:-1], bins, device=values.device)
    count = count.scatter_add(-1, values, torch.ones_like(values, dtype=torch.float32))
    share = count / values.shape[-1]
    return -(share * share.clamp(min=1e-12).log2()).sum(-1)
