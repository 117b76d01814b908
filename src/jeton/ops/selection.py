"""Which tokens stay: the best by a score, the best of each picture, evenly spaced, at random, or spread out.

All are deterministic, ties going to the lowest index; padding never wins. Every function returns a `Reduction` whose index is
ascending. Where rows may keep different numbers the slots beyond a row's own count are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..place import Place
from ..tokens import Reduction
from .budget import count, counts, shares, unit_sizes
from .ranking import rank, rank_in_units
from .similarity import normalise

_STORED = 4096  # above this many tokens max_min_diverse recomputes similarities row by row instead of storing them


def top_k(
    score: Tensor,
    keep: int | float,
    mask: Tensor | None = None,
    place: Place | None = None,
    per: str = "image",
    prefix: int = 0,
) -> Reduction:
    """Keep the highest `score` (B, N). With several units in `place` the budget is shared between them (see `shares`).

    The first `prefix` tokens always stay and count for nothing.
    """
    n = score.shape[1]
    if place is not None and place.units > 1:
        return _top_of_units(score, keep, mask, place, per)
    k = count(keep, n - prefix) + prefix
    if k == n and mask is None:
        return Reduction.identity(score.shape[0], n, score.device, prefix)
    score = _playing(score, mask)
    score[:, :prefix] = torch.inf
    if mask is None:
        index = score.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
        return Reduction.keep(index, n, prefix=prefix)
    quota = counts(keep, mask.sum(1, keepdim=True) - prefix) + prefix
    return pack((rank(score) < quota) & mask, k, ragged=True, prefix=prefix)


def best_of_units(score: Tensor, unit: Tensor, quota: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) true for the quota[b, u] highest scores of each unit u; `score` and `unit` (B, N), `quota` (B, U)."""
    units = quota.shape[1]
    own = unit.clamp(min=0) if mask is None else unit.clamp(min=0).masked_fill(~mask, units)
    place = rank_in_units(_playing(score, mask), own, units + 1)
    allowed = torch.nn.functional.pad(quota, (0, 1))  # padding stands in a unit of its own that keeps nothing
    return place < allowed.gather(1, own)


def pack(chosen: Tensor, k: int, ragged: bool, prefix: int = 0) -> Reduction:
    """Keep the tokens where `chosen` (B, N). Not `ragged`: exactly k in each row; `ragged`: at most k, the rest masked."""
    n = chosen.shape[1]
    slot = torch.where(chosen, chosen.cumsum(1) - 1, k)
    here = torch.arange(n, device=chosen.device).expand_as(slot)
    index = slot.new_zeros(slot.shape[0], k + 1).scatter(1, slot, here)[:, :k]
    real = torch.arange(k, device=chosen.device) < chosen.sum(1, keepdim=True) if ragged else None
    return Reduction.keep(index, n, real, prefix)


def evenly_spaced(n: int, keep: int | float, batch: int, device: torch.device, mask: Tensor | None = None) -> Reduction:
    """Keep token floor((i + 1/2) n / k) for i = 0..k-1, counted over the real tokens of each row."""
    k = count(keep, n)
    if mask is None:
        index = ((2 * torch.arange(k, device=device) + 1) * n) // (2 * k)
        return Reduction.identity(batch, n, device) if k == n else Reduction.keep(index.expand(batch, -1), n)
    real = mask.sum(1, keepdim=True)
    quota = counts(keep, real)
    slot = torch.arange(k, device=device)
    position = ((2 * slot + 1) * real // (2 * quota).clamp(min=1)).clamp(max=n - 1)
    index = (~mask).to(torch.uint8).argsort(dim=1, stable=True).gather(1, position)
    return Reduction.keep(index, n, slot < quota)


def noise(n: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) pseudo-random numbers in [0, 2^53), hashes of seed and position."""
    return hashed(torch.arange(n, device=device), seed)


def hashed(number: Tensor, seed: int) -> Tensor:
    """Pseudo-random numbers in [0, 2^53), a hash (splitmix64) of seed and whole `number`: no generator, no global state."""
    x = (number + 1) * -7046029254386353131 + seed * 6364136223846793005 % 2**62
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shift(x, shift)) * factor
    return _shift(x ^ _shift(x, 31), 11)


def gumbel(n: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) float32 standard Gumbel noise made from `noise`: the k largest of ``log p + gumbel`` are k draws without replacement
    with probability p."""
    uniform = (noise(n, seed, device).double() + 0.5) / 2**53
    return -(-uniform.log()).log().float()


def max_min_diverse(x: Tensor, keep: int | float, mask: Tensor | None = None) -> Reduction:
    """Greedily keep the tokens of x (B, N, D) whose smallest cosine distance to each other is largest.

    First the token whose nearest other token is farthest, then always the one farthest from all chosen before.
    """
    b, n, _ = x.shape
    k = count(keep, n)
    if k == n and mask is None:
        return Reduction.identity(b, n, x.device)
    picks = _greedy_picks(normalise(x), k, mask)
    if mask is None:
        return Reduction.keep(picks.sort(dim=1).values, n)
    real = torch.arange(k, device=x.device) < counts(keep, mask.sum(1, keepdim=True))
    chosen = torch.zeros(b, n + 1, dtype=torch.bool, device=x.device).scatter(1, picks.masked_fill(~real, n), True)
    return pack(chosen[:, :n], k, ragged=True)


def farthest(points: Tensor, k: int) -> Tensor:
    """(B, k) indices of points (B, N, D) by farthest-point sampling: the first one, then always the one farthest (L2) from all
    chosen before; the lower index wins ties."""
    picks = [points.new_zeros(points.shape[0], 1, dtype=torch.long)]
    distance = points.new_full(points.shape[:2], torch.inf)
    for _ in range(k - 1):
        last = points.gather(1, picks[-1][..., None].expand(-1, -1, points.shape[-1]))
        distance = torch.minimum(distance, (points - last).square().sum(-1))
        picks.append(distance.argmax(1, keepdim=True))
    return torch.cat(picks, 1)


def facility_location(
    x: Tensor, k: int, value: Tensor, balance: float = 1.0, quota: Tensor | None = None, mask: Tensor | None = None
) -> Reduction:
    """Greedily keep the set S of k tokens of x (B, N, D) with the largest
    ``balance · mean_i max_{j in S} cos(x_i, x_j) + (1 - balance) · mean_{j in S} value_j``; value (B, N).

    Under a mask row b keeps the quota[b, 0] that are picked first. A table of all cosines is stored.
    """
    b, n, _ = x.shape
    real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    unit = normalise(x)
    near = (unit @ unit.mT).masked_fill(~real[:, :, None], -2.0)  # padding is covered by nobody, and gains nothing
    shown, best = real.sum(1, keepdim=True), unit.new_full((b, n), -1.0)
    value = value.float()
    closed, picks = ~real, []
    for done in range(1, k + 1):
        gain = (1 - balance) * value / done
        if balance:
            gain = gain + balance * (near - best[:, :, None]).clamp(min=0).sum(1) / shown
        pick = gain.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        picks.append(pick)
        closed = closed.scatter(1, pick, True)
        best = torch.maximum(best, near.gather(2, pick[:, None].expand(-1, n, -1))[..., 0])
    order = torch.cat(picks, 1)
    if mask is None:
        return Reduction.keep(order.sort(dim=1).values, n)
    assert quota is not None
    within = torch.arange(k, device=x.device) < quota
    chosen = torch.zeros(b, n + 1, dtype=torch.bool, device=x.device).scatter(1, order.masked_fill(~within, n), True)
    return pack(chosen[:, :n], k, ragged=True)


# -- private -----------------------------------------------------------------------------------------------------------


def _top_of_units(score: Tensor, keep: int | float, mask: Tensor | None, place: Place, per: str) -> Reduction:
    n = score.shape[1]
    quota = shares(keep, per, unit_sizes(place.unit, place.units, mask))
    chosen = best_of_units(score, place.unit, quota, mask)
    if per == "image":
        return pack(chosen, count(keep, n), ragged=mask is not None)
    most = keep * place.units if isinstance(keep, int) else int(keep * n) + place.units
    return pack(chosen, min(n, most), ragged=True)


def _playing(score: Tensor, mask: Tensor | None) -> Tensor:
    """A float32 copy of the scores in which padding is below everything real."""
    score = score.float().clamp(min=torch.finfo(torch.float32).min)
    return score if mask is None else score.masked_fill(~mask, -torch.inf)


def _greedy_picks(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """(B, k) picks in the order they are made, for unit vectors x (B, N, D)."""
    b, n, _ = x.shape
    table, nearest = _distances(x, mask)
    offset = n * torch.arange(b, device=x.device)
    pick = nearest.argmax(1)
    picks, best = [pick], torch.full_like(nearest, torch.inf)
    if mask is not None:
        best = best.masked_fill(~mask, -2.0)
    for _ in range(k - 1):
        if table is not None:
            away = table.index_select(0, pick + offset)
        else:
            chosen = x.flatten(0, 1).index_select(0, pick + offset)
            away = (1 - (x @ chosen[..., None])[..., 0]).scatter(1, pick[:, None], -1.0)
        best = torch.minimum(best, away)  # its own distance counts as -1: nothing is chosen twice
        pick = best.argmax(1)
        picks.append(pick)
    return torch.stack(picks, 1)


def _distances(x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """1 - cosine as a table (B N, N) with -1 on the diagonal (None where N is too large to store one), and (B, N) the
    distance of each token to its nearest other one (-2 for padding)."""
    n = x.shape[1]
    step = n if n <= _STORED else 512
    nearest, table = [], None
    for start in range(0, n, step):
        part = 1 - x[:, start : start + step] @ x.mT
        part.diagonal(start, 1, 2).fill_(torch.inf)
        others = part if mask is None else part.masked_fill(~mask[:, None, :], torch.inf)
        nearest.append(others.amin(2))
        if step == n:
            part.diagonal(0, 1, 2).fill_(-1.0)
            table = part.flatten(0, 1)
    closest = torch.cat(nearest, 1)
    return table, closest if mask is None else closest.masked_fill(~mask, -2.0)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64, which torch's own shift is not."""
    return (x >> by) & ((1 << (64 - by)) - 1)
