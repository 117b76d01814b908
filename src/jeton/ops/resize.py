"""A smaller grid in place of each picture's own, as a `Reduction`: interpolated, pooled, picked or merged.

Letters: U units (pictures in a row), H x W the largest grid of any. Every function takes the new grid's rows and columns or the
number of tokens per unit, (B, U), 0 where a unit goes; k is the most that any row keeps. None may exceed what the unit has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..place import Place
from ..tokens import Entries, Reduction, Tokens, gather
from .budget import unit_sizes
from .grid import boxes, lookup
from .matching import Pairs, by_parity, merge_in_rounds
from .merging import merge
from .ranking import rank_in_units
from .selection import pack


def grid_within(budget: Tensor, height: Tensor | int, width: Tensor | int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid of at most `budget` cells, shaped like height x width: ``floor(sqrt(c h / w))`` rows and
    ``floor(sqrt(c w / h))`` columns, then a row more if that fits, else a column more if that does. 0 x 0 for a budget of 0."""
    shape = torch.as_tensor(height, device=budget.device).double() / width
    rows = (budget * shape + 1e-9).sqrt().floor().long().clamp(min=1).minimum(budget.clamp(min=1))
    cols = (budget / shape + 1e-9).sqrt().floor().long().clamp(min=1).minimum((budget // rows).clamp(min=1))
    taller = (rows + 1) * cols <= budget
    wider = ~taller & (rows * (cols + 1) <= budget)
    none = budget <= 0
    return (rows + taller.long()).masked_fill(none, 0), (cols + wider.long()).masked_fill(none, 0)


def bilinear(place: Place, rows: Tensor, cols: Tensor, k: int, mask: Tensor | None = None) -> Reduction:
    """Cell i of h new ones on H old ones lies at ``(i + 1/2) H / h - 1/2`` and mixes its two neighbours per axis linearly (no
    corners aligned, no antialiasing). Its representative is the old token nearest to its middle. Old tokens that are missing
    take no part."""
    new = _lay(place, rows, cols, k, mask)
    y, x = _source(new.row, new.tall, new.rows), _source(new.col, new.wide, new.cols)
    column, value = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            row, col = (y.floor().long() + dy).minimum(new.tall - 1), (x.floor().long() + dx).minimum(new.wide - 1)
            share = (1 - (y - y.floor() - dy).abs()) * (1 - (x - x.floor() - dx).abs())
            at = _token(new.table, new.unit, new.top + row, new.left + col)
            value.append(share.float().masked_fill((at == new.n) | ~new.real, 0))
            column.append(at.clamp(max=new.n - 1))
    total = torch.stack(value).sum(0)
    slot = torch.arange(k, device=total.device).expand_as(total)
    entries = Entries(slot.repeat(1, 4), torch.cat(column, 1), torch.cat([part / total.clamp(min=1e-12) for part in value], 1))
    return Reduction(new.index, new.assign, mask=new.real, entries=entries)


def adaptive(place: Place, rows: Tensor, cols: Tensor, k: int, mask: Tensor | None = None) -> Reduction:
    """Cell i of h new ones is the mean of the old ones from ``floor(i H / h)`` up to ``ceil((i + 1) H / h)``, per axis, so that
    neighbouring cells may share a line. Missing tokens do not count."""
    new = _lay(place, rows, cols, k, mask)
    here, (y, high, h), (x, wide, w), start = new.old
    column = torch.arange(new.n, device=here.device).expand_as(here)
    slots: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in (y * h // high, -(-(y + 1) * h // high) - 1):
        for j in (x * w // wide, -(-(x + 1) * w // wide) - 1):
            again = [(i == a) & (j == b) for _, a, b in slots]
            valid = here & ~torch.stack(again).any(0) if again else here
            slots.append((valid, i, j))
    found = [new.slot_of((start + i * w + j).masked_fill(~valid, -1)) for valid, i, j in slots]
    slot = torch.cat(found, 1)
    real = slot >= 0
    area = torch.zeros(slot.shape[0], k + 1, device=slot.device).scatter_add(1, slot.masked_fill(~real, k), real.float())
    value = real / area.gather(1, slot.clamp(min=0)).clamp(min=1)
    entries = Entries(slot.clamp(min=0), column.repeat(1, len(found)), value)
    return Reduction(new.index, new.assign, mask=new.real, entries=entries)


def linspace(place: Place, budget: Tensor, k: int, mask: Tensor | None = None) -> Reduction:
    """Of a unit's n tokens, row by row, those at ``floor(j (n - 1) / (c - 1))`` for j = 0..c-1; the first if c is 1."""
    units = place.units
    stands = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    own = place.unit.masked_fill(~stands, units)
    sizes = unit_sizes(own, units + 1)
    at = rank_in_units(-(place.row * (place.width.amax() + 1) + place.col), own, units + 1)
    c = torch.nn.functional.pad(budget, (0, 1)).gather(1, own)
    step, last = (c - 1).clamp(min=1), (sizes.gather(1, own) - 1).clamp(min=1)
    j = -(-at * step // last)
    chosen = torch.where(c <= 1, (at == 0) & (c == 1), (j < c) & (j * last // step == at))
    return pack(chosen & stands, k, ragged=True)


def merged(tokens: Tokens, budget: Tensor, k: int) -> Reduction:
    """Merge each unit down to its budget by bipartite soft matching of its features, at most half of it in a round, into means
    weighted by size."""
    assert tokens.place is not None
    cells = lookup(tokens.place, tokens.mask).flatten(2)
    x, there, size = (part.flatten(0, 1) for part in _on_cells(tokens, cells))
    step = _matched(x, there, size, budget.flatten()[:, None])
    cell = step.index.gather(1, step.assign.clamp(min=0)).view_as(cells)
    return _gathered(tokens, cells, cells.gather(2, cell), _entries(step).view(cells.shape), budget, k)


def merged_by_axes(tokens: Tokens, rows: Tensor, cols: Tensor, k: int) -> Reduction:
    """The same along each line of a unit's grid, down to `cols` tokens, and then along each of these columns, down to `rows`."""
    assert tokens.place is not None
    table = lookup(tokens.place, tokens.mask)
    b, u, height, width = table.shape
    x, there, size = (part.flatten(0, 2) for part in _on_cells(tokens, table))
    first = _matched(x, there, size, cols[..., None].expand(-1, -1, height).reshape(-1, 1))
    lines = first.apply(Tokens(x, there, size=size))
    x, there, size = (
        part.unflatten(0, (b, u, height)).transpose(2, 3).flatten(0, 2) for part in (lines.features, lines.real, lines.weight)
    )
    second = _matched(x, there, size, rows[..., None].expand(-1, -1, width).reshape(-1, 1))
    across = first.assign.clamp(min=0).view(b, u, height, width)
    turn = second.assign.clamp(min=0).view(b, u, width, height).transpose(2, 3).gather(3, across)
    row = second.index.view(b, u, -1).gather(2, (across * height + turn).flatten(2))
    col = first.index.view(b, u, -1).gather(2, row * width + across.flatten(2))
    weight = _entries(second).view(b, u, width, height).transpose(2, 3).gather(3, across).flatten(2)
    weight = weight * _entries(first).view(b, u, -1)
    cells = table.flatten(2)
    return _gathered(tokens, cells, cells.gather(2, row * width + col), weight, rows * cols, k)


# -- private -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _New:
    """The tokens of the new grids, (B, k) each: their unit, row, col in a grid of rows x cols, over a box of tall x wide old ones
    from top, left. Of the old ones: `old` says which take part, and of both axes where they stand, and in what."""

    table: Tensor
    n: int
    unit: Tensor
    row: Tensor
    col: Tensor
    rows: Tensor
    cols: Tensor
    top: Tensor
    left: Tensor
    tall: Tensor
    wide: Tensor
    real: Tensor
    index: Tensor
    assign: Tensor
    place_of: Tensor
    old: tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]

    def slot_of(self, cell: Tensor) -> Tensor:
        """(B, M) new tokens, as they finally stand, of cells counted unit by unit; -1 for none."""
        return _standing(self.place_of, cell)


def _standing(place_of: Tensor, cell: Tensor) -> Tensor:
    inside = (cell >= 0) & (cell < place_of.shape[1])
    return place_of.gather(1, cell.clamp(min=0, max=place_of.shape[1] - 1)).masked_fill(~inside, -1)


def _lay(place: Place, rows: Tensor, cols: Tensor, k: int, mask: Tensor | None) -> _New:
    """Where the new tokens lie; they stand in the order of their representatives."""
    box, table, n = boxes(place, mask), lookup(place, mask), place.unit.shape[1]
    quota = rows * cols
    ends = quota.cumsum(1)
    slot = torch.arange(k, device=ends.device).expand(ends.shape[0], k).contiguous()
    unit = torch.searchsorted(ends, slot, right=True).clamp(max=place.units - 1)
    h, w, top, left, tall, wide = (x.gather(1, unit) for x in (rows, cols, box.top, box.left, box.height, box.width))
    h, w = h.clamp(min=1), w.clamp(min=1)
    cell = slot - (ends - quota).gather(1, unit)
    row, col = cell // w, cell % w
    middle = _token(table, unit, top + (2 * row + 1) * tall // (2 * h), left + (2 * col + 1) * wide // (2 * w))
    real = (slot < ends[:, -1:]) & (middle < n)
    order = middle.masked_fill(~real, n).argsort(dim=1, stable=True)
    place_of = torch.where(real, torch.empty_like(order).scatter(1, order, slot), -1)
    unit, row, col, h, w, top, left, tall, wide, real, middle = (
        x.gather(1, order) for x in (unit, row, col, h, w, top, left, tall, wide, real, middle)
    )
    own = place.unit.clamp(min=0)
    stands = place.unit >= 0 if mask is None else mask & (place.unit >= 0)
    oh, ow, otop, oleft, otall, owide, start = (
        x.gather(1, own) for x in (rows, cols, box.top, box.left, box.height, box.width, ends - quota)
    )
    y, x = place.row - otop, place.col - oleft
    here = stands & (oh > 0)
    nearest = start + (2 * y + 1) * oh // (2 * otall) * ow + (2 * x + 1) * ow // (2 * owide)
    assign = _standing(place_of, nearest.masked_fill(~here, -1))
    old = (here, (y, otall, oh), (x, owide, ow), start)
    index = middle.masked_fill(~real, 0)
    return _New(table, n, unit, row, col, h, w, top, left, tall, wide, real, index, assign, place_of, old)


def _source(cell: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return ((cell.double() + 0.5) * old / new - 0.5).clamp(min=0)


def _token(table: Tensor, unit: Tensor, row: Tensor, col: Tensor) -> Tensor:
    height, width = table.shape[2:]
    cell = (unit * height + row.clamp(max=height - 1)) * width + col.clamp(max=width - 1)
    return table.flatten(1).gather(1, cell.clamp(min=0))


def _on_cells(tokens: Tokens, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, which are there, and sizes, on the cells of table (B, U, ...)."""
    flat = table.flatten(1).clamp(max=len(tokens) - 1)
    shape = table.shape[1:]
    return (
        gather(tokens.features, flat).unflatten(1, shape),
        table < len(tokens),
        tokens.weight.gather(1, flat).unflatten(1, shape),
    )


def _matched(x: Tensor, there: Tensor, size: Tensor, quota: Tensor) -> Reduction:
    """Rows of tokens x (R, P, D) merged down to quota (R, 1), round by round; the slots stay P."""

    def match(tokens: Tokens, r: int, cap: Tensor | None) -> Pairs:
        return by_parity(tokens.features, 0, tokens.order, tokens.mask)

    n = x.shape[1]
    return merge_in_rounds(Tokens(x, there, size=size), [n] * n.bit_length(), quota, match)


def _entries(step: Reduction) -> Tensor:
    return torch.ones_like(step.assign, dtype=torch.float32) if step.weight is None else step.weight


def _gathered(tokens: Tokens, cells: Tensor, target: Tensor, weight: Tensor, budget: Tensor, k: int) -> Reduction:
    """Tokens on cells (B, U, P) that go to the tokens `target` with `weight`; those of units without a budget are dropped."""
    n = len(tokens)
    target = target.masked_fill(budget[..., None] == 0, -1).flatten(1)
    spare = torch.full((cells.shape[0], n + 1), -1, dtype=torch.long, device=cells.device)
    into = spare.scatter(1, cells.flatten(1), target)[:, :n]
    share = torch.zeros(spare.shape, device=cells.device).scatter(1, cells.flatten(1), weight.flatten(1))[:, :n]
    return merge(into, k, weight=share, ragged=True)
