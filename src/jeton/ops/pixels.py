"""What the pixels of patches say before any encoder has looked at them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def variance(patches: Tensor) -> Tensor:
    """(...) float32: unbiased variance of patches (..., C, V) over their V values, averaged over the C channels."""
    return patches.float().var(-1).mean(-1)


def cut(pixels: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) as patches (B, N, C, size²), row by row; what is left over at the right and below is left out."""
    channels = pixels.shape[1]
    return F.unfold(pixels, size, stride=size).unflatten(1, (channels, size * size)).permute(0, 3, 1, 2)
