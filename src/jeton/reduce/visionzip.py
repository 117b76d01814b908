"""VisionZip: dominant tokens as they are, the rest gathered into contextual ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, Keys, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import count, counts, split, unit_sizes
from ..ops.merging import add_mean_weight, merge
from ..ops.ranking import rank_in_units
from ..ops.selection import best_of_units
from ..ops.similarity import normalise
from ..tokens import Reduction, Tokens, gather
from ._common import attention, check_score, read, score_of


@register(
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    year=2024,
    source="arXiv:2412.04467",
    family="vlm",
    stage="encoder",
)
@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the class token and the patches it attends to most (dominant); gather the others around a few of them (contextual).

    Of each picture: score (N) = mean over heads of the class token's attention at the block whose output the model uses; the
    best stay. Of the remaining M patches every floor(M / contextual)-th is an anchor, the first `contextual` of them; each
    other one goes to the anchor with the most similar key (cosine of keys averaged over heads), and
    anchor <- anchor + mean(assigned). The sum is not an average: that is the published rule.

    `keep` counts both kinds and the class token (one of the dominant), shared 54 : 10 as in the paper; `dominant` or
    `contextual` set one share, both together the total. Several pictures in a row share the budget by their sizes. Where the
    budget covers all patches, these stay alone. `score` "received" is for encoders without a class token. The reduction's
    `prefix` is how many slots in front may hold class tokens; those whose index is below the tokens' own prefix do.
    """

    site = "encoder"
    newlines = "drop"
    prefix_tokens = True
    keep: int | float = 64
    dominant: int | None = None
    contextual: int | None = None
    score: str = "class"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_score(self.score)
        for name in ("dominant", "contextual"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a count of tokens, 0 or more, or None, got {value!r}.")
        one = self.dominant if self.dominant is not None else self.contextual
        if self.dominant is not None and self.contextual is not None:
            check_keep(self.dominant + self.contextual, "dominant + contextual")
        elif one is not None and isinstance(self.keep, int) and one > self.keep:
            raise ValueError(
                f"{one} dominant or contextual tokens do not fit in keep={self.keep}; raise keep or set both shares."
            )

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=-1), "keys": Keys(layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        prefix, here = tokens.prefix, torch.arange(n, device=tokens.device)
        k = count(self._total, n - prefix)
        if k == n - prefix and tokens.mask is None:
            return Reduction.keep(here[prefix:].expand(b, -1), n)
        score = score_of(signals, "attention", "visionzip")
        keys = read(signals, "keys", "visionzip", "attention keys (B, N, d)")
        unit, units = self._units(tokens)
        patch = tokens.real & (here >= prefix)
        sizes = unit_sizes(unit, units, patch)
        budget = counts(self._total, sizes.sum(1, keepdim=True))
        total = split(budget[:, 0], sizes)
        part = total < sizes  # a unit that keeps all of its patches needs neither class token nor anchors
        context = self._contextual(total, budget).masked_fill(~part, 0)
        first = tokens.real & (here < min(prefix, units)) & (part & (total > context)).gather(1, unit)
        dominant = first | best_of_units(score, unit, total - context - unit_sizes(unit, units, first), patch)
        into, seats = torch.where(dominant, here, -1), self._seats(k, units)
        if seats:
            into = torch.where(dominant, here, _gathered(keys, unit, patch & ~dominant, context, seats))
        return merge(into, k, weight=add_mean_weight(into), prefix=prefix, ragged=tokens.mask is not None)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self._total).count(n))

    @property
    def _total(self) -> int | float:
        if self.dominant is not None and self.contextual is not None:
            return self.dominant + self.contextual
        return self.keep

    def _contextual(self, total: Tensor, k: Tensor) -> Tensor:
        """(B, U) contextual tokens among each unit's `total` (B, U), where the whole row keeps k (B, 1)."""
        if self.contextual is None and self.dominant is None:
            return ((2 * total * 10 + 64) // 128).clamp(min=1).minimum(total // 2)  # 10 of 64, rounded
        wanted = (k - (self.dominant or 0)).clamp(min=0) if self.contextual is None else self.contextual
        return ((2 * total * wanted + k) // (2 * k).clamp(min=1)).minimum(total)

    def _seats(self, k: int, units: int) -> int:
        """The most anchors a row that keeps k may have; rounding may add one per unit."""
        if self.contextual is None and self.dominant is None:
            wanted = max(1, (2 * k * 10 + 64) // 128)
        else:
            wanted = max(0, k - (self.dominant or 0)) if self.contextual is None else self.contextual
        return min(k, wanted + (units if units > 1 else 0))

    @staticmethod
    def _units(tokens: Tokens) -> tuple[Tensor, int]:
        """(B, N) unit of each token, the class tokens in front belonging to unit 0, 1, ...; and how many units there are."""
        b, n, _ = tokens.features.shape
        units = 1 if tokens.place is None else tokens.place.units
        if tokens.place is None or units == 1:
            return torch.zeros(b, n, dtype=torch.long, device=tokens.device), 1
        front = torch.arange(tokens.prefix, device=tokens.device).clamp(max=units - 1).expand(b, -1)
        return torch.cat([front, tokens.place.unit[:, tokens.prefix :].clamp(min=0)], 1), units


def _gathered(keys: Tensor, unit: Tensor, rest: Tensor, context: Tensor, seats: int) -> Tensor:
    """(B, N) into which anchor each token of `rest` (B, N) goes; anchors into themselves, all others -1.

    context (B, U) anchors per unit, at most `seats` in a row.
    """
    n, units = keys.shape[1], context.shape[1]
    here = torch.arange(n, device=keys.device)
    wanted = context.gather(1, unit)
    stride = (unit_sizes(unit, units, rest) // context.clamp(min=1)).gather(1, unit).clamp(min=1)
    position = rank_in_units(torch.where(rest, n - here, 0), unit, units)
    anchor = rest & (position % stride == 0) & (position // stride < wanted)
    seat = (~anchor).to(torch.uint8).argsort(dim=1, stable=True)[:, :seats]
    metric = normalise(keys)
    near = metric @ gather(metric, seat).mT
    fits = anchor.gather(1, seat)[:, None, :] & (unit[:, :, None] == unit.gather(1, seat)[:, None, :])
    target = seat.gather(1, near.masked_fill(~fits, -torch.inf).argmax(2))
    return torch.where(anchor, here, target.masked_fill(~rest | (wanted == 0), -1))
