"""A smaller picture: the oldest way to fewer tokens, and the fairest control, since it also shortens the encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..ops.budget import count, shares, unit_sizes
from ..ops.grid import boxes, cells, central, fit
from ..ops.merging import merge
from ..tokens import Reduction, Tokens


@register(title="Smaller picture (control)", year=2026, source="control", family="control", stage="pixels")
@dataclass(frozen=True)
class Downsample(Method):
    """Shrink the picture until its grid of patches has at most K cells, with the aspect ratio kept as nearly as that allows.

    grid(h, w) = (gh, gw): sqrt(K h / w) rows rounded down with all the columns that fit, or the same with rows and columns
    exchanged; the larger product wins, then the truer shape. 24 x 24 patches and K = 64 give 8 x 8, K = 60 gives 7 x 8.
    picture() resamples the pixels to that many patches. reduce() says which old patches each new one covers, for tokens that
    were made from the large picture: their average over the same cells.
    """

    site = "pixels"
    resizes = True
    keep: int | float = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in place of height x width."""
        k = Budget(self.keep).count(height * width)
        rows, cols = fit(*(torch.tensor(x) for x in (k, height, width)))
        return int(rows), int(cols)

    @staticmethod
    def picture(pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """pixels (B, C, H, W) resampled (antialiased, bicubic) to (B, C, gh · patch, gw · patch)."""
        size = (grid[0] * patch, grid[1] * patch)
        return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False).to(pixels.dtype)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        if tokens.place is None:
            raise ValueError("downsample needs the picture's grid, but these tokens have no place; use uniform or divprune.")
        k = count(self.keep, n)
        if k == n and tokens.mask is None:
            return Reduction.identity(b, n, tokens.device)
        box = boxes(tokens.place, tokens.mask)
        share = shares(self.keep, "image", unit_sizes(tokens.place.unit, tokens.place.units, tokens.mask))
        rows, cols = fit(share, box.height, box.width)
        quota = (rows * cols).masked_fill(share == 0, 0)
        label, off = cells(tokens.place, quota, tokens.mask, rows)
        return merge(central(label, off, k), k, tokens.size, ragged=True)

    def promise(self, n: int, depth: int = 12) -> Promise:
        k = Budget(self.keep).count(n)
        return Promise(k, exact=k == n)
