"""MCTF: fuse tokens that are alike, say little and are small, in front of the attention that tells which these are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..needs import Need, ReceivedAttention
from ..ops import matching
from ..ops.budget import count, evenly
from ..ops.merging import merge
from ..ops.ranking import rank
from ..ops.similarity import normalise
from ..tokens import Reduction, Tokens, gather
from ._common import quota, score_of

Size = TypeVar("Size", int, Tensor)


@register(
    title="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    year=2024,
    source="arXiv:2403.10030",
    family="vit",
    stage="block",
    headline="DeiT-S 4.61 to 2.60 G at 80.1 % (79.8 % without), after fine-tuning",
)
@dataclass(frozen=True)
class MCTF(Method):
    """In front of blocks, fuse r tokens by similarity, information and size, and give the block's attention map to what is left.

    Tokens at even places of the listing are alpha, those at odd places beta. A pair (i, j) scores
    ((cos(x_i, x_j) + 1) / 2)^(1/tau_sim) · (u_i u_j)^(1/tau_info) · (v_i v_j)^(1/tau_size), where u = (1/a) / max(1/a), v =
    (1/s) / max(1/s), a_j is the attention this block pays to token j (mean over heads and queries, log s added to the logits)
    and s its size. A tau of 0 leaves its factor out. The floor(r/2) best alphas go to their best betas; then, with the same
    scores, the other best betas go, with what they took in, to the best of the alphas that are left; without `bidirectional` r
    alphas go. Special tokens take no part in either direction.

    Pooling "attention" weighs tokens by a s, "size" by s, "mean" not at all (the released elementwise maximum is no weighted
    mean and left out). With `ahead` the block attends with the map of the unfused tokens, its columns added up and its rows
    averaged with the same weights over each group; only values are those of the fused tokens. Without, attention is computed
    again on these.

    `r` is a number per block, or below 1 a share of the patches; a block fuses at most half, and `least` patches stay (9 and a
    class token are the published 10). `blocks` None: all but the first; (3, 6, 9) with r=0.35 is the paper's fast setting. `keep`
    sets the number of patches left at last instead, evenly over the blocks. Called alone, reduce() fuses once, or as often as
    `keep` takes. Used as it is, or after fine-tuning the model beside itself with more tokens: `jeton.recipes.mctf.loss`.
    """

    site = "block"
    point = "before"
    proportional = True
    r: int | float = 16
    keep: int | float | None = None
    blocks: tuple[int, ...] | None = None
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    pooling: str = "attention"
    ahead: bool = True
    least: int = 9

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if isinstance(self.r, bool) or not isinstance(self.r, int | float) or self.r < 0 or (self.r > 1 and self.r % 1):
            raise ValueError(f"r must be a whole number of tokens per block, or a share below 1, got {self.r!r}.")
        if min(self.tau_sim, self.tau_info, self.tau_size) < 0:
            raise ValueError("tau_sim, tau_info and tau_size must be 0 (leave the factor out) or above.")
        if self.pooling not in ("attention", "size", "mean"):
            raise ValueError(f'pooling must be "attention", "size" or "mean", got {self.pooling!r}.')
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if not self.blocks or any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in self.blocks):
                raise ValueError(f"blocks must be block numbers from 0, such as (3, 6, 9), got {self.blocks!r}.")

    def needs(self) -> dict[str, Need]:
        reads = self.tau_info > 0 or self.pooling == "attention"
        return {"attention": ReceivedAttention(layer=None)} if reads else {}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n, goals, left = len(tokens) - tokens.prefix, [], None
        real = None if tokens.mask is None else tokens.count()[:, None] - tokens.prefix
        if self.keep is None:
            goals = [n - self._removed(n)]
            left = None if real is None else real - self._removed(real)
        else:
            goals = matching.halvings(n, count(self.keep, n))
            if real is not None:
                goals.append(goals[-1])  # a fraction of a shorter row may round to one halving more
                left = quota(signals, self.keep, real)
        paid = score_of(signals, "attention", "mctf").detach().clamp(min=1e-12) if self.needs() else None
        result = Reduction.identity(tokens.features.shape[0], len(tokens), tokens.device, tokens.prefix)
        for number, goal in enumerate(goals):
            now, r = len(tokens) - tokens.prefix, None
            if now < 2:
                continue
            if left is not None:
                real = tokens.count()[:, None] - tokens.prefix
                r = torch.minimum(real - left, real // 2).clamp(min=0)
            elif goal == now:
                continue
            step = self._fuse(tokens, paid, now - goal if r is None else r, goal)
            result = result.then(step)
            if number + 1 < len(goals):
                tokens = step.apply(tokens)
                paid = None if paid is None else replace(step, weight=(step.assign >= 0).float()).mix(paid)
        return result

    def steps(self, n: int, depth: int) -> list[Method | None]:
        steps: list[Method | None] = [None] * depth
        for block, (before, after) in zip(self._active(depth), pairwise([n, *self._plan(n, depth)]), strict=True):
            if after < before:
                steps[block] = replace(self, keep=after if self.keep else None)
        return steps

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self._plan(n, depth)[-1])

    # -- how many ------------------------------------------------------------------------------------------------------

    def _active(self, depth: int) -> list[int]:
        if self.blocks is None:
            return list(range(1, depth)) or [0]
        if max(self.blocks) >= depth:
            raise ValueError(
                f"mctf(blocks={self.blocks}) needs block {max(self.blocks)}, but there are only {depth} blocks; use blocks 0 to "
                f"{depth - 1}, or blocks=None."
            )
        return sorted(set(self.blocks))

    def _plan(self, n: int, depth: int) -> list[int]:
        """Patches behind each of the active blocks."""
        active = len(self._active(depth))
        if self.keep is not None:
            return evenly(n, Budget(self.keep).count(n), active)
        plan = []
        for _ in range(active):
            n -= self._removed(n)
            plan.append(n)
        return plan

    def _removed(self, n: Size) -> Size:
        """r of n patches, at most half of them, and no more than leaves `least`."""
        if isinstance(n, int):
            wanted = int(n * self.r + 1e-9) if self.r < 1 else int(self.r)
            return max(0, min(wanted, n // 2, n - self.least))
        wanted = (n.double() * self.r + 1e-9).long() if self.r < 1 else torch.full_like(n, int(self.r))
        return torch.minimum(torch.minimum(wanted, n // 2), n - self.least).clamp(min=0)

    # -- who with whom -------------------------------------------------------------------------------------------------

    def _fuse(self, tokens: Tokens, paid: Tensor | None, r: int | Tensor, goal: int) -> Reduction:
        """Fuse r tokens (of each row, if r is (B, 1)), so that at most `goal` patches are left."""
        pairs, n = self._pairs(tokens, paid), len(tokens)
        first = r // 2 if self.bidirectional else r
        edge, partner = pairs.score.max(2)
        turn = rank(edge)
        goes = (turn < first) & (edge > -torch.inf)
        into = torch.arange(n, device=tokens.device).expand(tokens.features.shape[0], n)
        into = into.scatter(1, pairs.alpha, torch.where(goes, pairs.beta.gather(1, partner), pairs.alpha))
        staying = pairs.place  # of betas, where they stay as they stand
        if self.bidirectional:
            back, partner = pairs.score.masked_fill(goes[:, :, None], -torch.inf).max(1)
            back_turn = rank(back)
            leaves = (back_turn < r - first) & (back > -torch.inf)
            into = into.scatter(1, pairs.beta, torch.where(leaves, pairs.alpha.gather(1, partner), pairs.beta))
            into = into.gather(1, into)  # an alpha goes on with the beta that took it in
            staying = staying.scatter(1, pairs.beta, back_turn)
        if tokens.mask is not None:
            into = into.masked_fill(~tokens.mask, -1)
        step = merge(into, goal + tokens.prefix, self._weight(tokens, paid), prefix=tokens.prefix, ragged=tokens.mask is not None)
        key = self._listing(tokens, pairs, turn, staying)
        if isinstance(r, Tensor):  # a row in which nothing goes keeps its listing, as it would alone
            key = torch.where(r > 0, key, pairs.place)
        key = key.gather(1, step.index)
        if step.mask is not None:
            key = key.masked_fill(~step.mask, 4 * n)
        return replace(step, order=key.argsort(dim=1, stable=True).argsort(dim=1))

    def _weight(self, tokens: Tokens, paid: Tensor | None) -> Tensor | None:
        """(B, N) what tokens weigh in their group."""
        if self.pooling == "attention" and paid is not None:
            return paid * tokens.weight
        return tokens.size if self.pooling == "size" else None

    def _pairs(self, tokens: Tokens, paid: Tensor | None) -> Pairs:
        n = len(tokens)
        place, slots = matching.listing(tokens.order, tokens.mask, n, tokens.device)
        place, slots = (x.expand(tokens.features.shape[0], n) for x in (place, slots))
        alpha, beta = slots[:, ::2], slots[:, 1::2]
        open_ = place >= tokens.prefix
        if tokens.mask is not None:
            open_ = open_ & tokens.mask
        factor = torch.ones_like(place, dtype=torch.float32)
        if self.tau_info and paid is not None:
            factor = factor * _relative(paid, tokens.mask) ** (1 / self.tau_info)
        if self.tau_size and tokens.size is not None:
            factor = factor * _relative(tokens.size, tokens.mask) ** (1 / self.tau_size)
        score = factor.gather(1, alpha)[:, :, None] * factor.gather(1, beta)[:, None, :]
        if self.tau_sim:
            unit = normalise(tokens.features.detach())
            near = ((gather(unit, alpha) @ gather(unit, beta).mT + 1) / 2).clamp(min=0)
            score = score * (near if self.tau_sim == 1 else near ** (1 / self.tau_sim))
        shut = ~(open_.gather(1, alpha)[:, :, None] & open_.gather(1, beta)[:, None, :])
        return Pairs(score.masked_fill(shut, -torch.inf), alpha, beta, place)

    def _listing(self, tokens: Tokens, pairs: Pairs, turn: Tensor, staying: Tensor) -> Tensor:
        """(B, N) what the published listing is sorted by: special tokens, alphas in place (without a class token by score), then
        betas, by falling score of the second direction where there is one."""
        n = len(tokens)
        key = pairs.place if tokens.prefix else pairs.place.scatter(1, pairs.alpha, turn)
        key = key.scatter(1, pairs.beta, n + staying.gather(1, pairs.beta))
        return torch.where(pairs.place < tokens.prefix, pairs.place - n, key)


class Pairs(NamedTuple):
    """`score` (B, A, C) of every alpha with every beta, -inf where they may not fuse; their positions `alpha` (B, A) and `beta`
    (B, C); `place` (B, N) of each token in the listing."""

    score: Tensor
    alpha: Tensor
    beta: Tensor
    place: Tensor


def _relative(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N) ``(1 / x) / max(1 / x)``, the largest over real tokens."""
    least = (x if mask is None else x.masked_fill(~mask, torch.inf)).amin(1, keepdim=True)
    return (least / x).clamp(max=1)
