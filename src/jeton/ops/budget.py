"""How many tokens: counts from a budget, and how a budget is shared between the pictures of a row or the layers of a model.

`keep` is a count (int) or a fraction (float). Letters: B rows, U units (pictures in a row).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ranking import rank


def count(keep: int | float, n: int) -> int:
    """Tokens kept of `n`: the nearest count to a fraction, at least one, at most all."""
    return min(n, max(1, round(keep * n))) if isinstance(keep, float) else min(n, keep)


def counts(keep: int | float, n: Tensor) -> Tensor:
    """`count` for a tensor of sizes, long; a size of zero keeps zero."""
    if isinstance(keep, float):
        return torch.minimum((n.double() * keep).round().long().clamp(min=1), n)
    return n.clamp(max=keep)


def unit_sizes(unit: Tensor, units: int, mask: Tensor | None = None) -> Tensor:
    """(B, U) how many real tokens each unit has. A token of no unit (-1) that is not masked counts with unit 0."""
    real = torch.ones_like(unit) if mask is None else mask.to(unit.dtype)
    return unit.new_zeros(unit.shape[0], units).scatter_add(1, unit.clamp(min=0), real)


def split(total: Tensor | int, sizes: Tensor) -> Tensor:
    """Share `total` (B,) between units in proportion to their sizes (B, U): largest remainder, exact, lowest unit on ties."""
    total = torch.minimum(torch.as_tensor(total, device=sizes.device).expand(sizes.shape[0]), sizes.sum(1))[:, None]
    return _largest_remainder(total * sizes.double() / sizes.sum(1, keepdim=True).clamp(min=1), total)


def shares(keep: int | float, per: str, sizes: Tensor) -> Tensor:
    """(B, U) tokens each unit keeps: `per` "image" splits one budget per row, "crop" or "frame" gives each unit its own."""
    return split(counts(keep, sizes.sum(1)), sizes) if per == "image" else counts(keep, sizes)


def allocate(weights: Tensor, total: Tensor | int, caps: Tensor) -> Tensor:
    """(B, U) long: `total` (B,) in proportion to `weights` (B, U), none above `caps` (B, U); adds up to min(total, sum(caps)).

    Fractions (see `proportional`) are settled by largest remainder, ties to the lowest unit.
    """
    total = torch.as_tensor(total, device=caps.device).expand(caps.shape[0])
    return _largest_remainder(proportional(weights, total, caps), torch.minimum(total, caps.sum(1))[:, None])


def proportional(weights: Tensor, total: Tensor | int, caps: Tensor) -> Tensor:
    """(B, U) float64, the same before any rounding. Whatever a full unit cannot take goes to the others in the same proportion,
    and where no weight is left, in proportion to the caps."""
    assert weights.shape == caps.shape and weights.dim() == 2
    total = torch.as_tensor(total, device=caps.device).expand(caps.shape[0])
    total = torch.minimum(total, caps.sum(1))[:, None]
    full = caps <= 0
    quota = torch.zeros_like(caps, dtype=torch.float64)
    for _ in range(caps.shape[1] + 1):  # each round fills at least one unit or changes nothing
        left = total - (caps * full).sum(1, keepdim=True)
        open_weight = weights.double().masked_fill(full, 0)
        alone = open_weight.sum(1, keepdim=True) <= 0
        open_weight = torch.where(alone, caps.double().masked_fill(full, 0), open_weight)
        quota = left * open_weight / open_weight.sum(1, keepdim=True).clamp(min=1e-300)
        full = full | (quota >= caps)
    return torch.where(full, caps.double(), quota)


def _largest_remainder(quota: Tensor, total: Tensor) -> Tensor:
    """Whole numbers next to `quota` (B, U) that add up to `total` (B, 1)."""
    whole = (quota + 1e-9).floor()
    rest = ((quota - whole) * 2**30).round()  # equal fractions must tie in spite of rounding
    place = rank(rest)
    return whole.long() + (place < total - whole.long().sum(1, keepdim=True)).long()


# -- over layers -------------------------------------------------------------------------------------------------------


def evenly(n: int, keep: int, depth: int) -> list[int]:
    """Tokens after each of `depth` layers when every layer takes away the same number, larger steps first: exactly `keep` left.

    A layer can take away at most half of what reaches it; a budget beyond that raises ValueError.
    """
    wanted, now = [], n
    for layer in range(depth):
        now -= math.ceil((now - keep) / (depth - layer))
        wanted.append(now)
    return _within_reach(n, wanted, keep)


def linearly(n: int, keep: int, depth: int, rising: bool = False) -> list[int]:
    """Tokens after each of `depth` layers when what layer l takes away falls (`rising`: grows) in a straight line to none:
    floor(r (1 - l / depth)) with r = floor(2 (n - keep) / depth), until exactly `keep` are left."""
    most, gone, steps = 2 * (n - keep) // depth, 0, []
    for layer in range(depth):
        step = min(n - keep - gone, most * (depth - layer) // depth)
        steps.append(step)
        gone += step
    for layer in range(n - keep - gone):  # what rounding down has left over
        steps[layer % depth] += 1
    steps = steps[::-1] if rising else steps
    return _within_reach(n, [n - sum(steps[: layer + 1]) for layer in range(depth)], keep)


def geometrically(n: int, keep: int, depth: int, halving: bool = True) -> list[int]:
    """Tokens after each of `depth` layers when every layer keeps the same share: round(n (keep / n)^(l / depth)).

    With `halving` a layer can take away at most half of what reaches it.
    """
    wanted = [round(n * (keep / n) ** ((layer + 1) / depth)) for layer in range(depth)]
    return _within_reach(n, wanted, keep) if halving else wanted


def _within_reach(n: int, wanted: list[int], keep: int) -> list[int]:
    """Bend a plan so that no layer takes away more than half of its tokens, and the last still reaches `keep`."""
    if keep << len(wanted) < n:
        raise ValueError(
            f"{len(wanted)} layers can halve {n} tokens to {-(-n >> len(wanted))} at the least, not to keep={keep}; "
            f"keep more or use more layers."
        )
    plan, now = [], n
    for layer, want in enumerate(wanted):
        now = min(now, max((now + 1) // 2, min(want, keep << (len(wanted) - 1 - layer))))
        plan.append(now)
    return plan
