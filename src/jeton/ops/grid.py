"""Cells of a picture: how a grid of patches is cut into exactly k rectangles, or into a smaller grid.

Letters: U units (pictures in a row). Whole-number arithmetic on tensors, so that rows may hold pictures of different shapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..place import Place


class Boxes(NamedTuple):
    """(B, U) each: the smallest rectangle that holds the real tokens of a unit, in patches."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def boxes(place: Place, mask: Tensor | None = None) -> Boxes:
    """Where the real tokens of each unit lie; any-resolution crops may have lost their padded border."""
    real = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    unit = place.unit.masked_fill(~real, place.units)
    shape = (unit.shape[0], place.units + 1)
    low = [unit.new_full(shape, 2**31).scatter_reduce(1, unit, x, "amin")[:, :-1] for x in (place.row, place.col)]
    high = [unit.new_full(shape, -1).scatter_reduce(1, unit, x, "amax")[:, :-1] for x in (place.row, place.col)]
    low = [torch.minimum(a, b.clamp(min=0)) for a, b in zip(low, high, strict=True)]  # an absent unit: 0, not 2^31
    return Boxes(*low, *((b - a + 1).clamp(min=1) for a, b in zip(low, high, strict=True)))


def lookup(place: Place, mask: Tensor | None = None) -> Tensor:
    """(B, U, H, W) which token shows row h, column w of each unit, N where none does; H, W are `place.sides`."""
    if place.sides is None:
        raise ValueError("these tokens do not say how large their grids are; build their Place with sides=(rows, columns).")
    (b, n), (height, width) = place.unit.shape, place.sides
    stands = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    total = place.units * height * width
    cell = torch.where(stands, (place.unit * height + place.row) * width + place.col, total)
    here = torch.arange(n, device=cell.device).expand(b, n)
    return cell.new_full((b, total + 1), n).scatter(1, cell, here)[:, :-1].unflatten(1, (place.units, height, width))


def cells(place: Place, quota: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cut each unit into quota[b, u] cells: (B, N) number of each token's cell in its row (-1 for none), and (B, N) its squared
    distance to the middle of that cell (in quarter patches, whole numbers).

    `rows` (B, U) says how many rows of cells, by default about ``sqrt(quota · height / width)``. Each row of cells has one
    quota / rows-th of them, rounded down or up. quota must not exceed the area of the unit.
    """
    box = boxes(place, mask)
    if rows is None:
        rows = (quota * box.height / box.width).sqrt().round().long()
        rows = torch.maximum(rows, -(-quota // box.width)).minimum(box.height).minimum(quota)
    unit = place.unit.clamp(min=0)
    top, left, height, width = (field.gather(1, unit) for field in box)
    k, gh = quota.gather(1, unit), rows.gather(1, unit).clamp(min=1)
    row, col = place.row - top, place.col - left
    band = row * gh // height
    first = band * k // gh
    across = ((band + 1) * k // gh - first).clamp(min=1)
    column = col * across // width
    start = (quota.cumsum(1) - quota).gather(1, unit)
    out = (place.unit < 0) | (k == 0)
    if mask is not None:
        out = out | ~mask
    off = _off_middle(row, band, gh, height) + _off_middle(col, column, across, width)
    return (start + first + column).masked_fill(out, -1), off


def central(label: Tensor, off: Tensor, k: int) -> Tensor:
    """(B, N) for each token the position of the most central token of its cell (lowest on ties), -1 where label is -1."""
    n = label.shape[1]
    here = torch.arange(n, device=label.device)
    group = label.masked_fill(label < 0, k)
    worst = torch.iinfo(torch.long).max
    best = label.new_full((label.shape[0], k + 1), worst).scatter_reduce(1, group, off * n + here, "amin")
    return (best % n).gather(1, group).masked_fill(label < 0, -1)


def tiles(height: int, width: int, side: int, device: torch.device | str | None = None) -> Tensor:
    """(U, side²) the cells of a height x width grid, numbered row by row, in squares of side x side, as these lie row by row; -1
    where a square at the right or lower border reaches over it."""
    rows, cols = -(-height // side), -(-width // side)
    cell = torch.arange(height * width, device=device).view(height, width)
    whole = torch.nn.functional.pad(cell, (0, cols * side - width, 0, rows * side - height), value=-1)
    return whole.view(rows, side, cols, side).transpose(1, 2).reshape(rows * cols, side * side)


def fit(k: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the smaller grid in place of height x width with at most k cells.

    Two candidates stand next to the true aspect ratio: ``sqrt(k h / w)`` rows rounded down with as many columns as fit, and the
    same with rows and columns exchanged. The one with more cells wins, then the one closer in shape, then the first.
    """
    wide = _fill(k, height, width)
    tall = _fill(k, width, height)[::-1]

    def skew(grid: tuple[Tensor, Tensor]) -> Tensor:
        return ((grid[0] * width).double() / (grid[1] * height)).log().abs()

    more = tall[0] * tall[1] - wide[0] * wide[1]
    better = (more > 0) | ((more == 0) & (skew(tall) < skew(wide) - 1e-9))
    return torch.where(better, tall[0], wide[0]), torch.where(better, tall[1], wide[1])


def fitted(k: int, height: int, width: int) -> tuple[int, int]:
    """`fit` of whole numbers, for grids that are known without looking at the device."""
    ways = []
    for a, b in ((height, width), (width, height)):
        rows = max(1, min(math.floor(math.sqrt(k * a / b + 1e-9)), a, k))
        ways.append((rows, min(max(1, k // rows), b)))
    wide, tall = ways[0], ways[1][::-1]
    skews = [abs(math.log(rows * width / (cols * height))) for rows, cols in (wide, tall)]
    more = tall[0] * tall[1] - wide[0] * wide[1]
    return tall if more > 0 or (more == 0 and skews[1] < skews[0] - 1e-9) else wide


def _fill(k: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    rows = ((k * height).double() / width + 1e-9).sqrt().floor().long().minimum(height).minimum(k).clamp(min=1)
    return rows, (k // rows).clamp(min=1).minimum(width)


def _off_middle(x: Tensor, cell: Tensor, parts: Tensor, length: Tensor) -> Tensor:
    """Squared distance of x to the middle of its cell, times four: cell c of `parts` holds x with c = x · parts // length."""
    first = -(-cell * length // parts)
    last = -(-(cell + 1) * length // parts) - 1
    return (2 * x - first - last) ** 2


def squares(place: Place, side: float, stitched: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) the number of the square of `side` x `side` tokens in which each token lies: floor(row / side), floor(col / side) of
    its picture. `side` need not be whole. Where `stitched` (B, 1), crops form one map, whose real part begins at 0.

    The numbers are below N; tokens of no picture share one for themselves, as does padding.
    """
    real = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    crop = stitched & (place.unit > 0) & real
    row, col = place.row, place.col
    if place.crop_row is not None and place.crop_col is not None:
        row = row + torch.where(crop, place.crop_row * place.height, 0)
        col = col + torch.where(crop, place.crop_col * place.width, 0)
    row, col = (x - torch.where(crop, x.masked_fill(~crop, 2**31).amin(1, keepdim=True), 0) for x in (row, col))
    sheet = torch.where(crop, 1, place.unit).masked_fill(~real, -1)
    down, across = ((x.double() / side).floor().long().clamp(min=0) for x in (row, col))
    return numbered(torch.where(real, (sheet * 2**20 + down) * 2**20 + across, -1))


def numbered(key: Tensor) -> Tensor:
    """(B, N) equal keys of a row (B, N) as equal numbers below N, in the order of the keys."""
    order = key.argsort(dim=1, stable=True)
    ordered = key.gather(1, order)
    new = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0))
    return torch.empty_like(order).scatter(1, order, new.cumsum(1))
