"""Square windows of a picture: how alike the tokens of each are, and which windows merge into one token.

Letters: s side of a window, W windows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..place import Place
from .ranking import rank
from .similarity import normalise


def windows(place: Place, side: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """(B, N) number of the s x s window each token stands in, (B, N) true at the middle token of a window, and W, the most
    windows a row can have. Rows and columns beyond the last whole window, tokens of no picture and padding stand in none (-1).

    A row is one picture, listed row by row.
    """
    high, wide = place.height // side, place.width // side
    row, col = place.row // side, place.col // side
    out = (place.unit < 0) | (row >= high) | (col >= wide)
    out = out if mask is None else out | ~mask
    number = (row * wide + col).masked_fill(out, -1)
    middle = (place.row % side == side // 2) & (place.col % side == side // 2) & ~out
    if place.shape is None:
        return number, middle, place.unit.shape[1] // side**2
    return number, middle, (place.shape[0] // side) * (place.shape[1] // side)


def alike(x: Tensor, number: Tensor, count: int, side: int) -> Tensor:
    """(B, W) mean cosine between different tokens of each window; -inf where a row has no such window.

    ``(|sum of unit vectors|² - s²) / (s² (s² - 1))`` is that mean, without a table of pairs.
    """
    own = number.masked_fill(number < 0, count)
    unit = normalise(x)
    total = unit.new_zeros(x.shape[0], count + 1, x.shape[2]).scatter_add(1, own[..., None].expand_as(unit), unit)
    size = unit.new_zeros(x.shape[0], count + 1).scatter_add(1, own, torch.ones_like(unit[..., 0]))
    area = side**2
    mean = (total.square().sum(2) - area) / (area * (area - 1))
    return mean.masked_fill(size != area, -torch.inf)[:, :count]


def most_alike(likeness: Tensor, most: int | None = None, threshold: float | None = None) -> Tensor:
    """(B, W) true for the windows at or above `threshold`, of these the `most` most alike; ties to the lowest."""
    chosen = likeness > -torch.inf
    if threshold is not None:
        chosen = chosen & (likeness >= threshold)
    return chosen if most is None else chosen & (rank(likeness) < most)


def into_windows(number: Tensor, middle: Tensor, chosen: Tensor) -> Tensor:
    """(B, N) the token each goes to: the middle of its window where that is among the chosen (B, W), else itself."""
    count = chosen.shape[1]
    here = torch.arange(number.shape[1], device=number.device).expand_as(number)
    own = number.masked_fill(number < 0, count)
    spare = torch.where(middle, own, count)
    target = number.new_zeros(number.shape[0], count + 1).scatter(1, spare, here)
    goes = torch.nn.functional.pad(chosen, (0, 1)).gather(1, own)
    return torch.where(goes, target.gather(1, own), here)
