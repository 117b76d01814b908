"""Token-level correlation-guided compression: crops that repeat themselves keep fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, ClassAttention, Keys, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import allocate, count, counts, unit_sizes
from ..ops.crops import cropped
from ..ops.merging import mean_weight, merge
from ..ops.neighbours import nearest, twins
from ..ops.outliers import outliers
from ..ops.ranking import rank_in_units
from ..ops.selection import gumbel
from ..tokens import Reduction, Tokens
from ._common import read, score_of


@register(
    title="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
    year=2024,
    source="arXiv:2407.14439",
    family="vlm",
    stage="encoder",
    headline="about 66 % of tokens removed on ten document sets at comparable scores",
)
@dataclass(frozen=True)
class TokenCorrelation(Method):
    """How many tokens a crop keeps follows from how often its patches repeat; which ones, from class attention at two depths.

    Of a crop of N patches, one is redundant if more than `min_twins` N others have a key with cosine above `tau` in block `low`;
    N times the density, that is the number of patches that are not redundant, are drawn without replacement with probability
    proportional to the class token's attention in block `low` (`sample` False: the highest). Added are all patches whose class
    attention in block `deep` is an outlier, above Q3 + iqr (Q3 - Q1) of the crop; never is a crop left empty. Each dropped patch
    joins the kept one of its crop with the most similar key: their mean, or with `merge` "attention" the mean weighted by the
    attention in block `deep`. The thumbnail of cropped images stays whole.

    `keep` None is the paper: counts vary with the content. A `keep` sets the total instead; thumbnail and crops share it in
    proportion to what they would have kept, most needed tokens first (outliers, then draws). Draws hash `seed` and the token's
    position, so results repeat. No code is published and the thresholds are not in the text we have: `tau`, `min_twins`, `low`
    and `deep` are ours.
    """

    site = "encoder"
    newlines = "drop"
    keep: int | float | None = None
    tau: float = 0.7
    min_twins: float = 0.1
    iqr: float = 1.5
    low: int = 1
    deep: int = -1
    sample: bool = True
    merge: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.merge not in ("mean", "attention"):
            raise ValueError(f'merge must be "mean" or "attention", got {self.merge!r}.')
        if not 0 <= self.min_twins <= 1:
            raise ValueError(f"min_twins is a share of a crop's patches, from 0 to 1, got {self.min_twins!r}.")

    def needs(self) -> dict[str, Need]:
        return {
            "early": ClassAttention(layer=self.low),
            "late": ClassAttention(layer=self.deep),
            "keys": Keys(layer=self.low),
        }

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        place, real = tokens.place, tokens.real
        if self.keep is not None and tokens.mask is None and count(self.keep, n) == n:
            return Reduction.identity(b, n, tokens.device)
        early, late = (score_of(signals, name, "token-correlation") for name in ("early", "late"))
        keys = read(signals, "keys", "token-correlation", "attention keys (B, N, d)")
        unit, units = (torch.zeros_like(tokens.origin), 1) if place is None else (place.unit.clamp(min=0), place.units)
        own = unit.masked_fill(~real, units)
        sizes = unit_sizes(own, units + 1)[:, :units]
        salient = outliers(late, unit, units, self.iqr, tokens.mask)
        drawn = rank_in_units(self._lot(early), own, units + 1)
        urgency = rank_in_units(torch.where(salient, n, 0) - drawn, own, units + 1)
        quota = self._density(keys, own, sizes)
        wanted = salient | (drawn < torch.nn.functional.pad(quota, (0, 1)).gather(1, own))
        quota = unit_sizes(unit, units, wanted & real).clamp(min=1).minimum(sizes)
        if place is not None and units > 1:
            quota = torch.where(cropped(place, sizes) & (torch.arange(units, device=own.device) == 0), sizes, quota)
        if self.keep is not None:
            quota = allocate(quota, counts(self.keep, sizes.sum(1)), sizes)
        chosen = urgency < torch.nn.functional.pad(quota, (0, 1)).gather(1, own)
        into = torch.where(chosen, torch.arange(n, device=own.device), nearest(keys, chosen, own)).masked_fill(~real, -1)
        k = n if self.keep is None else count(self.keep, n)
        step = merge(into, k, tokens.size, ragged=self.keep is None or tokens.mask is not None)
        return step if self.merge == "mean" else _weighted(step, late)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False) if self.keep is None else Promise(Budget(self.keep).count(n))

    def _density(self, keys: Tensor, own: Tensor, sizes: Tensor) -> Tensor:
        """(B, U) patches of each unit that do not repeat: sizes · density."""
        enough = torch.nn.functional.pad(self.min_twins * sizes.float(), (0, 1)).gather(1, own)
        alone = twins(keys, self.tau, own) <= enough
        return unit_sizes(own, sizes.shape[1] + 1, alone)[:, :-1]

    def _lot(self, attention: Tensor) -> Tensor:
        """(B, N) whose order draws without replacement in proportion to `attention` (Gumbel's trick), or its logarithm."""
        lot = attention.clamp(min=1e-30).log()
        return lot + gumbel(attention.shape[1], self.seed, attention.device) if self.sample else lot


def _weighted(step: Reduction, attention: Tensor) -> Reduction:
    """The same groups, each averaged with `attention` (B, N) as weights."""
    share = mean_weight(step.assign, step.k, attention.clamp(min=1e-12))
    return Reduction(step.index, step.assign, share.masked_fill(step.assign < 0, 0), mask=step.mask)
