"""EViT: keep what the class token attends to, fuse the rest into one token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, register
from ..needs import Need
from ..ops.budget import geometrically
from ..ops.merging import merge
from ..ops.ranking import rank
from ..tokens import Reduction, Tokens
from ._common import attention, blocks_of, check_at_blocks, check_score, quota, score_of

Size = TypeVar("Size", int, Tensor)


@register(
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    year=2022,
    source="arXiv:2202.07800",
    family="vit",
    stage="block",
    headline="DeiT-S 50 % faster for 0.3 points of ImageNet accuracy",
)
@dataclass(frozen=True)
class EViT(Method):
    """At a few blocks, between attention and MLP, keep the patches the class token attends to most and fuse the others.

    a (B, T) = mean over heads of the class token's attention in the same block over the T patches (a fused token of an earlier
    stage is one of them). ceil(ratio T) patches stay; the others become one token f = sum a_i x_i, whose weights sum to less
    than 1 (to 1 with `normalise`); without `fuse` they are dropped. The published sequence is [class, kept by falling a, f].

    `locations` are the blocks; None means (3, 6, 9) of 12, in proportion for other depths. `keep` sets the number of patches
    left at last, the fused one counted, by the same share at each location. `score` "received" uses the attention each patch
    receives instead, for encoders without a class token.
    """

    site = "block"
    ratio: float = 0.7
    keep: int | float | None = None
    locations: tuple[int, ...] | None = None
    fuse: bool = True
    normalise: bool = False
    score: str = "class"

    def __post_init__(self) -> None:
        check_at_blocks(self)
        check_score(self.score)

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        prefix, mask = tokens.prefix, tokens.mask
        kept = self._kept(n - prefix)
        if kept == n - prefix and mask is None:
            return Reduction.identity(b, n, tokens.device, prefix)
        score = score_of(signals, "attention", "evit")
        here = torch.arange(n, device=tokens.device)
        shown = score if mask is None else score.masked_fill(~mask, -torch.inf)
        place = rank(torch.where(here < prefix, torch.inf, shown))
        stay: int | Tensor = prefix + kept
        if mask is not None:
            real = tokens.count()[:, None] - prefix
            stay = prefix + self._kept(real, None if self.keep is None else quota(signals, self.keep, real))
        lost = place >= stay
        best_lost = ((place == stay) * here).sum(1, keepdim=True)
        into = torch.where(lost, best_lost if self.fuse else -1, here)
        if mask is not None:
            into, lost = into.masked_fill(~mask, -1), lost & mask
        if self.normalise:
            score = score / score.masked_fill(~lost, 0).sum(1, keepdim=True).clamp(min=1e-12)
        k = prefix + self._after(n - prefix)
        step = merge(into, k, weight=torch.where(lost, score, 1.0), prefix=prefix, ragged=mask is not None)
        return replace(step, order=place.gather(1, step.index))

    def steps(self, n: int, depth: int) -> list[Method | None]:
        stages = blocks_of("evit", self.locations, depth)
        plan = dict(zip(stages, self._plan(n, len(stages)), strict=True))
        return [(replace(self, keep=plan[x]) if self.keep else self) if x in plan else None for x in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self._plan(n, len(blocks_of("evit", self.locations, depth)))[-1])

    def _plan(self, n: int, stages: int) -> list[int]:
        """Patches after each stage, the fused one counted."""
        if self.keep is not None:
            return geometrically(n, Budget(self.keep).count(n), stages, halving=False)
        plan = []
        for _ in range(stages):
            n = self._after(n)
            plan.append(n)
        return plan

    def _kept(self, n: Size, quota: Tensor | None = None) -> Size:
        """Patches of n that stay as they are; for tensors of n, `quota` is how many are left in all."""
        if self.keep is None:
            share = Fraction(str(self.ratio))
            return -(-n * share.numerator // share.denominator)
        if isinstance(n, int):
            left = Budget(self.keep).count(n)
            return left - int(self.fuse and left < n)
        assert quota is not None
        return quota - ((quota < n) & self.fuse).long()

    def _after(self, n: int) -> int:
        """Patches left of n, the fused one counted."""
        kept = self._kept(n)
        return kept + int(self.fuse and kept < n)
