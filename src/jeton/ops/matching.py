"""Who merges with whom: bipartite soft matching, by parity of position (ToMe) or of energy rank (PiToMe).

A matcher lists senders, best first, each with its receiver; the first r of them merge. Letters: A senders, T patches (tokens
behind the prefix), d width of the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tokens import Reduction, Tokens, gather
from .merging import merge
from .neighbours import nearest
from .ranking import rank_in_units
from .similarity import normalise


class Pairs(NamedTuple):
    """`sender` (B, A), best first, and the `receiver` (B, A) of each, as positions; `key` (B, N): what the published listing of
    the merged tokens is sorted by, None if the order in which tokens stand means nothing to the method; `edge` (B, A): their
    similarity, -inf where a pair may not merge."""

    sender: Tensor
    receiver: Tensor
    key: Tensor | None = None
    edge: Tensor | None = None


Match = Callable[[Tokens, int, Tensor | None], Pairs]


def by_parity(metric: Tensor, prefix: int = 0, order: Tensor | None = None, mask: Tensor | None = None) -> Pairs:
    """ToMe: tokens at even places of the listing send, those at odd places receive, each sender to its most similar receiver.

    metric (B, N, d). `order` (B, N) is the rank of each token in the published listing, None for 0..N-1. The first `prefix`
    places neither send nor receive. The new listing is: prefix, unmerged even ones (in place with a class token, best edge
    first without one), odd ones.
    """
    b, n, _ = metric.shape
    unit = normalise(metric)
    if order is None and mask is None:
        place = torch.arange(n, device=metric.device).expand(b, n)
        even, odd, sims = place[:, ::2], place[:, 1::2], unit[:, ::2] @ unit[:, 1::2].mT
    else:
        place, slots = listing(order, mask, n, metric.device)
        even, odd = slots[:, ::2], slots[:, 1::2]
        sims = gather(unit, even) @ gather(unit, odd).mT
    sims = _without_prefix(sims, prefix)
    if mask is not None:
        sims = sims.masked_fill(~(mask.gather(1, even)[:, :, None] & mask.gather(1, odd)[:, None, :]), -torch.inf)
    edge, partner = sims.max(2)
    best = edge.argsort(dim=1, descending=True, stable=True)
    sender = even.gather(1, best)
    key = torch.where((place % 2 == 1) & (place >= prefix), place + n, place)
    if prefix == 0:
        key = key.scatter(1, sender, torch.arange(even.shape[1], device=metric.device).expand_as(sender))
    return Pairs(sender, odd.gather(1, partner.gather(1, best)), key, edge.gather(1, best))


def by_parity_in_units(
    metric: Tensor, unit: Tensor, merges: Tensor, order: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ToMe's rule in every unit by itself: its merges[b, u] best senders go to their most similar receivers of the same unit.

    metric (B, N, d), unit (B, N), merges (B, U), none above half of the unit's tokens. `order` (B, N) is the rank of each token
    in the listing by whose places they take turns, None for 0..N-1. Returns `into` (B, N) for `merge`, and (B, N) what the next
    listing of the remaining tokens of a unit is sorted by: senders that stay, best first, then receivers. Similarities are
    computed a slab of rows at a time.
    """
    n, units = metric.shape[1], merges.shape[1]
    here = torch.arange(n, device=metric.device).expand_as(unit)
    own = unit if mask is None else unit.masked_fill(~mask, units)
    place = rank_in_units(-(here if order is None else order), own, units + 1)
    sends = (place % 2 == 0) & (own < units)
    receiver = nearest(metric, (place % 2 == 1) & (own < units), own)
    x = normalise(metric)
    edge = (x * gather(x, receiver.clamp(min=0))).sum(2).masked_fill(~sends | (receiver < 0), -torch.inf)
    turn = rank_in_units(edge, own, units + 1)
    goes = sends & (receiver >= 0) & (turn < F.pad(merges, (0, 1)).gather(1, own))
    into = torch.where(goes, receiver, here).masked_fill(own == units, -1)
    return into, torch.where(sends, turn, n + place)


def energy(metric: Tensor, margin: float, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """(B, T) ``E_i = mean_j ELU_alpha(cos(x_i, x_j) - margin)``: high inside a large group of similar tokens.

    Padding has -inf.
    """
    unit = normalise(metric)
    pull = F.elu(unit @ unit.mT - margin, alpha)
    if mask is None:
        return pull.mean(2)
    pull = pull.masked_fill(~mask[:, None, :], 0).sum(2) / mask.sum(1, keepdim=True).clamp(min=1)
    return pull.masked_fill(~mask, -torch.inf)


def by_energy(metric: Tensor, level: Tensor, r: int, cap: Tensor | None = None) -> Pairs:
    """PiToMe: the 2r tokens of highest energy `level` (B, T) merge: even ranks send, odd ranks receive. metric (B, T, d).

    `cap` (B, 1) lowers r for single rows.
    """
    order = level.argsort(dim=1, descending=True, stable=True)[:, : 2 * r]
    even, odd = order[:, ::2], order[:, 1::2]
    unit = normalise(metric)
    sims = gather(unit, even) @ gather(unit, odd).mT
    if cap is not None:
        closed = torch.arange(odd.shape[1], device=odd.device) >= cap
        sims = sims.masked_fill(closed[:, None, :], -torch.inf)
    return Pairs(even, odd.gather(1, sims.max(2).indices))


def by_energy_parity(metric: Tensor, level: Tensor, mask: Tensor | None = None) -> Pairs:
    """PiToMe's 'bsm' form: ToMe's rule on the listing by descending energy `level` (B, T). metric (B, T, d)."""
    order = level.argsort(dim=1, descending=True, stable=True)
    listed = None if mask is None else mask.gather(1, order)
    pairs = by_parity(gather(metric, order), mask=listed)
    return Pairs(order.gather(1, pairs.sender), order.gather(1, pairs.receiver))


def merge_pairs(tokens: Tokens, pairs: Pairs, goal: int, cap: Tensor | None = None) -> Reduction:
    """Merge the best pairs until `goal` patches are left, by size-weighted mean; under a mask the best cap[b] of each row."""
    n, prefix = len(tokens), tokens.prefix
    into = torch.arange(n, device=tokens.device).expand(pairs.sender.shape[0], n)
    if cap is None:
        r = n - prefix - goal
        into = into.scatter(1, pairs.sender[:, :r], pairs.receiver[:, :r])
    else:
        within = torch.arange(pairs.sender.shape[1], device=into.device) < cap
        into = into.scatter(1, pairs.sender, torch.where(within, pairs.receiver, pairs.sender))
        into = into.masked_fill(~tokens.real, -1)
    step = merge(into, goal + prefix, tokens.size, prefix=prefix, ragged=cap is not None)
    if pairs.key is None:
        return step
    key = pairs.key
    if cap is not None:  # a row in which nothing merges keeps its listing, as it would alone
        key = torch.where(cap > 0, key, tokens.order if tokens.order is not None else torch.arange(n, device=key.device))
    key = key.gather(1, step.index)
    if step.mask is not None:
        key = key.masked_fill(~step.mask, 2 * n)
    return replace(step, order=key.argsort(dim=1, stable=True).argsort(dim=1))


def merge_in_rounds(tokens: Tokens, goals: list[int], quota: Tensor | None, match: Match) -> Reduction:
    """Merge down to each of `goals` in turn, patches left per round, where a round can at most halve.

    `tokens.features` is the metric. Under a mask `quota` (B, 1) is what each row keeps at last. `match(tokens, r, cap)` pairs
    the tokens of one round.
    """
    result = Reduction.identity(tokens.features.shape[0], len(tokens), tokens.device, tokens.prefix)
    for number, goal in enumerate(goals):
        now, cap = len(tokens) - tokens.prefix, None
        if now < 2:
            continue
        if quota is not None:
            real = tokens.count()[:, None] - tokens.prefix
            cap = torch.minimum(real - quota, real // 2).clamp(min=0)
        elif goal == now:
            continue
        step = merge_pairs(tokens, match(tokens, now // 2 if cap is not None else now - goal, cap), goal, cap)
        result = result.then(step)
        if number + 1 < len(goals):
            tokens = step.apply(tokens)
    return result


def halvings(n: int, keep: int) -> list[int]:
    """Tokens left after each round on the way from n to `keep`, every round removing at most half; one round at least."""
    plan = [max(keep, n - n // 2)]
    while plan[-1] > keep:
        plan.append(max(keep, plan[-1] - plan[-1] // 2))
    return plan


# -- private -----------------------------------------------------------------------------------------------------------


def listing(order: Tensor | None, mask: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, N) place of each token in the listing and (B, N) token at each place; padding stands last, so that a row is listed
    as it would be alone."""
    given = order if order is not None else torch.arange(n, device=device).expand(mask.shape if mask is not None else (1, n))
    if mask is not None:
        given = given + n * (~mask).long()
    slots = given.argsort(dim=1, stable=True)
    return slots.argsort(dim=1), slots


def _without_prefix(sims: Tensor, prefix: int) -> Tensor:
    """Rows and columns of the first `prefix` places of the listing set to -inf: they are neither sent nor received."""
    if prefix == 0:
        return sims
    sims = sims.clone()
    sims[:, : (prefix + 1) // 2] = -torch.inf
    sims[:, :, : prefix // 2] = -torch.inf
    return sims
