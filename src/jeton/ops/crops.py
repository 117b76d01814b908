"""A thumbnail and the crops that show its parts in more detail: which rows have them, and what the thumbnail says of each crop.

Letters: U units (pictures in a row), unit 0 the thumbnail, crop (r, c) of R x C crops unit 1 + r C + c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..place import Place


def crop_grid(place: Place) -> tuple[Tensor, Tensor]:
    """(B, 1) rows and columns of the crops."""
    assert place.crop_rows is not None and place.crop_cols is not None, "this place knows no crops"
    return place.crop_rows.amax(1, keepdim=True), place.crop_cols.amax(1, keepdim=True)


def cropped(place: Place, sizes: Tensor) -> Tensor:
    """(B, 1) true where a row is a thumbnail and its crops; false for a single picture and for frames, whose crop grid is 1 x 1.

    sizes (B, U) tokens of each unit.
    """
    if place.crop_rows is None:
        return torch.zeros_like(sizes[:, :1], dtype=torch.bool)
    rows, cols = crop_grid(place)
    pictures = (sizes > 0).sum(1, keepdim=True)
    crops = (pictures > 1) & ((rows * cols > 1) | ((rows * cols == 1) & (pictures == 2)))
    return crops if place.time is None else crops & (place.time.amax(1, keepdim=True) <= 0)


def block_sums(score: Tensor, place: Place, mask: Tensor | None = None) -> Tensor:
    """(B, U) sum of the thumbnail's score (B, N) over the part that each crop shows, 0 for the thumbnail itself.

    Blocks are floor(height / R) x floor(width / C) cells; the last ones take what is left over.
    """
    rows, cols = crop_grid(place)
    down = torch.minimum(place.row // (place.height // rows.clamp(min=1)).clamp(min=1), rows - 1)
    across = torch.minimum(place.col // (place.width // cols.clamp(min=1)).clamp(min=1), cols - 1)
    thumbnail = _real(place, mask) & (place.unit == 0)
    unit = (1 + down * cols + across).clamp(min=0, max=place.units - 1)
    return score.new_zeros(score.shape[0], place.units).scatter_add(1, unit, score.masked_fill(~thumbnail, 0))


def enlarged(score: Tensor, place: Place, mask: Tensor | None = None) -> Tensor:
    """(B, N) for each token of a crop the thumbnail's score (B, N) at the same spot: the thumbnail's map is stretched, bilinearly
    and without aligned corners, over the real part of the stitched crops. 0 for all other tokens."""
    n, real = score.shape[1], _real(place, mask)
    small, crop = real & (place.unit == 0), real & (place.unit > 0)
    assert place.crop_row is not None and place.crop_col is not None
    height = place.height.masked_fill(~small, 1).amax(1, keepdim=True)
    width = place.width.masked_fill(~small, 1).amax(1, keepdim=True)
    cell = (place.row * width + place.col).masked_fill(~small, n).clamp(max=n)
    table = score.new_zeros(score.shape[0], n + 1).scatter(1, cell, score.masked_fill(~small, 0))
    top, bottom, y = _axis(place.crop_row * place.height + place.row, height, crop)
    left, right, x = _axis(place.crop_col * place.width + place.col, width, crop)

    def at(row: Tensor, col: Tensor) -> Tensor:
        return table.gather(1, (row * width + col).masked_fill(~crop, n).clamp(max=n))

    upper = (1 - x) * at(top, left) + x * at(top, right)
    lower = (1 - x) * at(bottom, left) + x * at(bottom, right)
    return ((1 - y) * upper + y * lower).masked_fill(~crop, 0).to(score.dtype)


def _axis(at: Tensor, small: Tensor, crop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For positions `at` (B, N) along one side of the stitched crops: the two neighbours on a side of `small` (B, 1) cells, and
    how far the position lies towards the second one."""
    first = at.masked_fill(~crop, 2**31).amin(1, keepdim=True)
    length = at.masked_fill(~crop, -1).amax(1, keepdim=True) - first + 1
    here = ((2 * (at - first) + 1).double() * small / (2 * length.clamp(min=1)) - 0.5).clamp(min=0)
    low = torch.minimum(here.floor().long(), small - 1)
    return low, torch.minimum(low + 1, small - 1), here - low


def _real(place: Place, mask: Tensor | None) -> Tensor:
    return place.unit >= 0 if mask is None else (place.unit >= 0) & mask
