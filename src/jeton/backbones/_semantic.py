"""Semantic tokens: a few that stand for a map of image tokens, made of it by attention, and read by it.

Letters: B pictures, H x W image tokens, S semantic tokens, C width, w window, s seeds on a side of a window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.patchify import resize_positions


class ReadingBlock(nn.Module):
    """x reads `context`: x <- [x +] g attention(norm(x), norm(context)), then x <- x + g' mlp(norm'(x)).

    One norm serves both. `scale` is where the gains g and g' (C,) begin, None for none of them. A block on itself is an ordinary
    one.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, bias: bool = True, scale: float | None = None, residual: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.output = scaled(nn.Linear(width, width), scale)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), scaled(nn.Linear(hidden, width), scale))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        mine, theirs = self.norm(x), self.norm(context)
        parts = (self.query(mine), self.key(theirs), self.value(theirs))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + read if self.residual else read
        return x + self.mlp(self.norm_mlp(x))


class Scaled(nn.Module):
    """What a linear map gives, times a learned gain for each channel (layer scale)."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear, self.begin = linear, scale
        self.gain = nn.Parameter(torch.full((linear.out_features,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


def scaled(linear: nn.Linear, scale: float | None) -> nn.Module:
    return linear if scale is None else Scaled(linear, scale)


def seeds(grid: Tensor, window: tuple[int, int], sample: int) -> Tensor:
    """A map (B, H, W, C) of whole windows to (B, H / w, W / w, s², C): each window's maxima over s x s cells."""
    cut = grid.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, rows, w, columns, w, C)
    cells = cut.permute(0, 1, 3, 5, 2, 4)
    found = F.adaptive_max_pool2d(cells.flatten(0, 2), sample)
    return found.flatten(2).transpose(1, 2).unflatten(0, cells.shape[:3])


def regions(grid: Tensor, window: tuple[int, int], size: int) -> Tensor:
    """A map (B, H, W, C) to (B, H / w, W / w, k, C): the k = size² tokens around each window, moved inwards at the border (all of
    a map that is smaller)."""
    near = []
    for extent, one in zip(grid.shape[1:3], window):
        wide = min(max(size, one), extent)
        first = torch.arange(0, extent, one, device=grid.device) - (wide - one) // 2
        near.append(first.clamp(0, extent - wide)[:, None] + torch.arange(wide, device=grid.device))
    rows, columns = near
    found = grid[:, rows[:, None, :, None], columns[None, :, None, :]]
    return found.flatten(3, 4)


class LocalGeneration(nn.Module):
    """The first semantic tokens: seeds of each window read themselves and the region around it. `window` None: the whole map."""

    def __init__(self, block: ReadingBlock, sample: int, window: int | None = None, region: int = 0) -> None:
        super().__init__()
        self.block, self.sample, self.window, self.region = block, sample, window, region

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, H W, C) to (B, S, C), in rows of the grid that the seeds of all windows make."""
        grid = x.unflatten(1, (height, width))
        window = (height, width) if self.window is None else (min(self.window, height), min(self.window, width))
        grid = _whole(grid, window)
        few = seeds(grid, window, self.sample)
        around = regions(grid, window, self.region)
        read = self.block(few.flatten(0, 2), torch.cat([few, around], 3).flatten(0, 2)).view_as(few)
        return read.unflatten(3, (self.sample, -1)).transpose(2, 3).flatten(1, 4)


def _whole(grid: Tensor, window: tuple[int, int]) -> Tensor:
    """A map widened to whole windows by its own border."""
    short = [-extent % one for extent, one in zip(grid.shape[1:3], window)]
    if not any(short):
        return grid
    return F.pad(grid.permute(0, 3, 1, 2), (0, short[1], 0, short[0]), mode="replicate").permute(0, 2, 3, 1)


class SemanticGroup(nn.Module):
    """Image tokens to semantic tokens and, with `back`, to image tokens again.

    image      an ordinary block on image tokens; None: none
    local      `LocalGeneration`
    table      learned tokens (1, S, C) that are added before the second generation, resized to the number there are; None: none
    everywhere the second generation: semantic tokens read themselves and all image tokens
    among      blocks on the semantic tokens alone
    back       recovery: the image tokens of the first block read the semantic tokens; None: semantic tokens go on
    """

    def __init__(
        self,
        image: nn.Module | None,
        local: LocalGeneration,
        everywhere: ReadingBlock,
        among: list[ReadingBlock],
        back: ReadingBlock | None,
        table: int = 0,
    ) -> None:
        super().__init__()
        self.image, self.local, self.everywhere, self.back = image, local, everywhere, back
        self.among = nn.ModuleList(among)
        self.table = nn.Parameter(torch.zeros(1, table, everywhere.norm.normalized_shape[0])) if table else None

    def forward(self, x: Tensor, dimensions: tuple[int, int], *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.image is not None:
            x = self.image(x, dimensions, *args, **kwargs)[0]
        few = self.local(x, *dimensions)
        own = few if self.table is None else few + fitted(self.table, few.shape[1])
        few = self.everywhere(own, torch.cat([few, x], 1))
        for block in self.among:
            few = block(few, few)
        return (few if self.back is None else self.back(x, few)), None


def fitted(table: Tensor, count: int) -> Tensor:
    """A square table of learned tokens for another square number of them."""
    if table.shape[1] == count:
        return table
    side = math.isqrt(count)
    if math.isqrt(table.shape[1]) ** 2 != table.shape[1] or side**2 != count:
        raise ValueError(f"a table of {table.shape[1]} learned tokens cannot be resized to {count}; use square pictures.")
    return resize_positions(table, (side, side), 0)


class Alone(nn.Module):
    """An ordinary block as a group takes it."""

    def __init__(self, block: ReadingBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, dimensions: tuple[int, int]) -> tuple[Tensor, None]:
        return self.block(x, x), None


def begin(module: nn.Module, std: float) -> None:
    """Where the parameters begin that transformers does not know of."""
    if isinstance(module, Scaled):
        init.constant_(module.gain, module.begin)
    elif isinstance(module, SemanticGroup) and module.table is not None:
        init.trunc_normal_(module.table, std=std)
