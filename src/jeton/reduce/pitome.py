"""PiToMe: merge inside large groups of similar tokens, protect what stands alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

from ..method import Budget, Keys, Method, Need, Promise, Signals, check_keep, register
from ..ops import matching
from ..ops.budget import count, geometrically
from ..tokens import Reduction, Tokens
from . import _common
from ._common import check_ratio

Size = TypeVar("Size", int, Tensor)


@register(
    title="Accelerating Transformers with Spectrum-Preserving Token Merging",
    year=2024,
    source="arXiv:2405.16148",
    family="vit",
    stage="block",
    headline="40 to 60 % of FLOPs saved at 0.5 points of accuracy on classification",
)
@dataclass(frozen=True)
class PiToMe(Method):
    """In every block, between attention and MLP, merge tokens of high energy: those with many similar ones.

    With S = cos of the attention keys, averaged over heads (B, T, d): E_i = mean_j ELU_alpha(S_ij - mu), where
    mu = margin (1 - l / L) at block l of L. r = floor(T - T ratio) tokens go. Form "pitome": of the 2r tokens with highest
    energy every second one, by rank, merges into its most similar one among the others; the rest is protected. Form "bsm": all
    tokens split by rank parity, the r best pairs merge. "auto" takes bsm in the first half of the blocks and pitome after, as
    released for DeiT. Values are size-weighted means; special tokens take no part. Where a patch stands makes no difference.

    `keep` sets the number of patches left at last instead, by the same share in every block. Called alone, reduce() merges once
    by `ratio`, or as often as `keep` takes, in the pitome form unless told otherwise; without keys as a signal it compares the
    features.
    """

    site = "block"
    ratio: float = 0.9
    keep: int | float | None = None
    margin: float = 0.75
    alpha: float = 1.0
    form: str = "auto"
    proportional: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0.5 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: one merging can take away at most half of the tokens; use 0.5 to 1.0.")
        if self.keep is not None:
            check_keep(self.keep)
        if not math.isfinite(self.margin) or not self.alpha > 0:
            raise ValueError(f"margin must be a finite number and alpha above 0, got {self.margin!r} and {self.alpha!r}.")
        if self.form not in ("auto", "pitome", "bsm"):
            raise ValueError(f'form must be "auto", "pitome" or "bsm", got {self.form!r}.')

    def needs(self) -> dict[str, Need]:
        return {"keys": Keys(layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        metric = signals["keys"] if signals and "keys" in signals else tokens.features
        n, real = len(tokens) - tokens.prefix, None
        if tokens.mask is not None:
            real = tokens.count()[:, None] - tokens.prefix
        if self.keep is None:
            goals = [n - self._removed(n)]
            quota = None if real is None else real - self._removed(real)
        else:
            goals = matching.halvings(n, count(self.keep, n))
            if real is not None:
                goals.append(goals[-1])  # a fraction of a shorter row may round to one halving more
            quota = None if real is None else _common.quota(signals, self.keep, real)
        return matching.merge_in_rounds(replace(tokens, features=metric, place=None), goals, quota, self._match)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        plan = [n, *self._plan(n, depth)]
        steps: list[Method | None] = []
        for block, (before, after) in enumerate(pairwise(plan)):
            form = ("bsm" if block < (depth + 1) // 2 else "pitome") if self.form == "auto" else self.form
            here = replace(self, form=form, margin=self.margin * (1 - block / depth), keep=after if self.keep else None)
            steps.append(here if after < before else None)
        return steps

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self._plan(n, depth)[-1])

    def _plan(self, n: int, depth: int) -> list[int]:
        """Patches after each block."""
        if self.keep is not None:
            return geometrically(n, Budget(self.keep).count(n), depth)
        plan = []
        for _ in range(depth):
            n -= self._removed(n)
            plan.append(n)
        return plan

    def _removed(self, n: Size) -> Size:
        """r = floor(n - n ratio), in whole numbers."""
        share = 1 - Fraction(str(self.ratio))
        return n * share.numerator // share.denominator

    def _match(self, tokens: Tokens, r: int, cap: Tensor | None) -> matching.Pairs:
        metric = tokens.features[:, tokens.prefix :]
        mask = None if tokens.mask is None else tokens.mask[:, tokens.prefix :]
        level = matching.energy(metric, self.margin, self.alpha, mask)
        if self.form == "bsm":
            pairs = matching.by_energy_parity(metric, level, mask)
        else:
            pairs = matching.by_energy(metric, level, r, cap)
        return matching.Pairs(pairs.sender + tokens.prefix, pairs.receiver + tokens.prefix)
