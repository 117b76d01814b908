"""Lines of patches: whole rows of a picture, or of the crops of a picture as they are stitched.

Letters: U units (pictures in a row).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..place import Place
from .budget import unit_sizes
from .ranking import rank_in_units


def line_means(score: Tensor, place: Place, stitched: bool = True, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, N) number of the line of patches each token stands in, and (B, N) the mean score of every line, in float32.

    Lines are numbered from the top of the first picture. `stitched`: the crops of a thumbnail are one picture with lines through
    all of them, as they are stitched; otherwise each has its own. Tokens outside `mask` do not count.
    """
    picture, row = place.unit, place.row
    if stitched and place.crop_row is not None:
        assert place.crop_rows is not None and place.crop_cols is not None
        crop = (place.unit > 0) & (place.crop_rows * place.crop_cols > 1)
        picture = torch.where(crop, 1, picture)
        row = torch.where(crop, place.crop_row * place.height + row, row)
    key = picture * 2**24 + row
    order = key.argsort(dim=1, stable=True)
    starts = F.pad(key.gather(1, order).diff(dim=1) != 0, (1, 0)).long().cumsum(1)
    line = torch.empty_like(order).scatter(1, order, starts)
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    total = score.new_zeros(score.shape, dtype=torch.float32).scatter_add(1, line, score.float().masked_fill(~real, 0))
    size = torch.zeros_like(total).scatter_add(1, line, real.float())
    return line, total / size.clamp(min=1)


def best_of_lines(
    score: Tensor,
    place: Place,
    quota: Tensor,
    mask: Tensor | None = None,
    aside: Tensor | None = None,
    stitched: bool = True,
    partial: bool = True,
) -> Tensor:
    """(B, N) true for quota[b, u] tokens of each unit u, line by line: lines of highest mean score (B, N) first, and from the
    last one its best tokens. quota (B, 1) takes all units of `place` together, (B, U) each alone.

    Without `partial` a last line that does not fit is left out, unless it is the only one. Tokens `aside` (B, N) count for no
    mean and come last in their line.
    """
    n, units = score.shape[1], quota.shape[1]
    real = torch.ones_like(place.unit, dtype=torch.bool) if mask is None else mask
    own = (place.unit.clamp(min=0) if units > 1 else torch.zeros_like(place.unit)).masked_fill(~real, units)
    line, mean = line_means(score, place, stitched, real if aside is None else real & ~aside)
    by_mean = rank_in_units(mean.gather(1, line), own, units + 1)  # lines of equal mean are mixed here, so each takes its first
    first = by_mean.new_full(mean.shape, n).scatter_reduce(1, line, by_mean.masked_fill(~real, n), "amin")
    within = rank_in_units(score if aside is None else score.masked_fill(aside, -torch.inf), own, units + 1)
    turn = rank_in_units(-(first.gather(1, line) * (n + 1) + within), own, units + 1)
    if not partial:
        end = turn.new_zeros(mean.shape).scatter_reduce(1, line, turn.masked_fill(~real, -1), "amax") + 1
        fits = real & (end.gather(1, line) <= F.pad(quota, (0, 1)).gather(1, own))
        whole = unit_sizes(own, units + 1, fits)[:, :units]
        quota = torch.where(whole > 0, whole, quota)
    return turn < F.pad(quota, (0, 1)).gather(1, own)
