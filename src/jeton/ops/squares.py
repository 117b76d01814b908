"""Square grids of features (B, H·W, D), row by row: their windows, pooled and resized; and waves that tell where a cell is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def side(cells: int) -> int:
    """The side of a square grid of so many cells."""
    root = math.isqrt(cells)
    if root * root != cells:
        raise ValueError(f"{cells} features are no square grid; drop the class token, and use square pictures.")
    return root


def windows(x: Tensor, size: int) -> Tensor:
    """(B, H·W, D) to (B, h·w, size², D): the windows of size x size cells row by row, the cells of each row by row."""
    whole = side(x.shape[1])
    if whole % size:
        raise ValueError(f"windows of {size} x {size} do not tile a grid of {whole} x {whole}.")
    rows = x.unflatten(1, (whole // size, size, whole // size, size))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_of(tokens: int, cells: int) -> int:
    """Side of the windows that make `tokens` of a square grid of `cells`: sqrt(cells / tokens), which must be whole."""
    size = math.isqrt(cells // tokens) if 0 < tokens <= cells else 0
    if not size or size * size * tokens != cells:
        whole = side(cells)
        fitting = [(whole // d) ** 2 for d in range(1, whole + 1) if whole % d == 0]
        raise ValueError(f"{cells} features cannot be pooled to {tokens} in square windows; choose one of {fitting}.")
    return size


def pool(x: Tensor, tokens: int | None) -> Tensor:
    """(B, H·W, D) averaged in square windows to (B, tokens, D); x itself where nothing is to be pooled."""
    if tokens is None or tokens == x.shape[1]:
        return x
    return windows(x, window_of(tokens, x.shape[1])).mean(2)


def resize(x: Tensor, to: int, mode: str = "bilinear") -> Tensor:
    """(B, H·W, D) interpolated to (B, to·to, D), in float32; no corners aligned, no antialiasing."""
    picture = x.float().transpose(1, 2).unflatten(2, (side(x.shape[1]),) * 2)
    return F.interpolate(picture, size=(to, to), mode=mode, align_corners=False).flatten(2).transpose(1, 2).to(x.dtype)


def waves(grid: int, width: int) -> Tensor:
    """(grid², width) 2-D sine and cosine positions, one half of the channels for the column, the other for the row: in each,
    sin then cos of ``p / 10000^(4 i / width)``, i < width / 4."""
    if width % 4:
        raise ValueError(f"2-D sine and cosine positions need a width that is a multiple of 4, not {width}.")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    columns, rows = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1).float()
