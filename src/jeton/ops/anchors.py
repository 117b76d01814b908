"""Dominant tokens stay as they are; what is left of a picture gathers around a few anchors: VisionZip's selection.

Letters: U units (pictures in a row), d width of the metric.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tokens import Reduction, Tokens, gather
from .budget import split, unit_sizes
from .merging import add_mean_weight, merge
from .ranking import rank_in_units
from .selection import best_of_units
from .similarity import normalise

Contextual = Callable[[Tensor, Tensor], Tensor]


def dominant_and_contextual(
    tokens: Tokens, score: Tensor, metric: Tensor, budget: Tensor, contextual: Contextual, k: int, seats: int
) -> Reduction:
    """Keep budget[b, 0] tokens of each row, at most k: the best by `score` (B, N), and anchors that take in all others.

    Several units share the budget (B, 1) by their sizes. ``contextual(total (B, U), budget)`` says how many of each unit's total
    are anchors, at most `seats` in a row. Of the M tokens that are not dominant every floor(M / anchors)-th is an anchor; each
    other one goes to the anchor with the most similar `metric` (B, N, d), and anchor <- anchor + mean(assigned). A unit that
    keeps all of its patches keeps them alone. Class tokens in front (the tokens' prefix) are dominant and count.
    """
    n, prefix = len(tokens), tokens.prefix
    here = torch.arange(n, device=tokens.device)
    unit, units = _units(tokens)
    patch = tokens.real & (here >= prefix)
    sizes = unit_sizes(unit, units, patch)
    total = split(budget[:, 0], sizes)
    part = total < sizes  # a unit that keeps all of its patches needs neither class token nor anchors
    context = contextual(total, budget).masked_fill(~part, 0)
    first = tokens.real & (here < min(prefix, units)) & (part & (total > context)).gather(1, unit)
    dominant = first | best_of_units(score, unit, total - context - unit_sizes(unit, units, first), patch)
    into = torch.where(dominant, here, -1)
    if seats:
        into = torch.where(dominant, here, gathered(metric, unit, patch & ~dominant, context, seats))
    return merge(into, k, weight=add_mean_weight(into), prefix=prefix, ragged=tokens.mask is not None)


def gathered(metric: Tensor, unit: Tensor, rest: Tensor, context: Tensor, seats: int) -> Tensor:
    """(B, N) into which anchor each token of `rest` (B, N) goes; anchors into themselves, all others -1.

    context (B, U) anchors per unit, at most `seats` in a row.
    """
    n, units = metric.shape[1], context.shape[1]
    here = torch.arange(n, device=metric.device)
    wanted = context.gather(1, unit)
    stride = (unit_sizes(unit, units, rest) // context.clamp(min=1)).gather(1, unit).clamp(min=1)
    position = rank_in_units(torch.where(rest, n - here, 0), unit, units)
    anchor = rest & (position % stride == 0) & (position // stride < wanted)
    seat = (~anchor).to(torch.uint8).argsort(dim=1, stable=True)[:, :seats]
    metric = normalise(metric)
    near = metric @ gather(metric, seat).mT
    fits = anchor.gather(1, seat)[:, None, :] & (unit[:, :, None] == unit.gather(1, seat)[:, None, :])
    target = seat.gather(1, near.masked_fill(~fits, -torch.inf).argmax(2))
    return torch.where(anchor, here, target.masked_fill(~rest | (wanted == 0), -1))


def share(total: Tensor, part: int, of: int) -> Tensor:
    """``part / of`` of each total, rounded; at least one, at most half of it."""
    return ((2 * total * part + of) // (2 * of)).clamp(min=1).minimum(total // 2)


def most_seats(k: int, part: int, of: int) -> int:
    """What `share` gives k, for units that together keep k: a bound on the anchors of a row with one unit."""
    return max(1, (2 * k * part + of) // (2 * of))


def _units(tokens: Tokens) -> tuple[Tensor, int]:
    """(B, N) unit of each token, the class tokens in front belonging to unit 0, 1, ...; and how many units there are."""
    b, n, _ = tokens.features.shape
    units = 1 if tokens.place is None else tokens.place.units
    if tokens.place is None or units == 1:
        return torch.zeros(b, n, dtype=torch.long, device=tokens.device), 1
    front = torch.arange(tokens.prefix, device=tokens.device).clamp(max=units - 1).expand(b, -1)
    return torch.cat([front, tokens.place.unit[:, tokens.prefix :].clamp(min=0)], 1), units
