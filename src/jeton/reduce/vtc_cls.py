"""VTC-CLS: keep what the class token attends to over several blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Budget, ClassAttention, Method, Need, Promise, Signals, check_keep, register
from ..ops.selection import top_k
from ..tokens import Reduction, Tokens
from ._common import check_per, score_of

_COMBINE: dict[str, Callable[[Tensor, int], Tensor]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}


@register(
    title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    year=2024,
    source="arXiv:2412.05819",
    family="vlm",
    stage="encoder",
    headline="better than FastV and PruMerge at equal counts on eight sets",
)
@dataclass(frozen=True)
class VTCCLS(Method):
    """Keep the K patches with most class attention, summed over the last blocks up to the one whose output the model uses.

    score (B, N) = sum over blocks of the mean over heads of attention (B, H, N) of the class token over the patches, each row
    normalised over all keys, the class token among them; the K highest stay, in order. `combine` "min" or "max" stands in for
    the sum. `layers` is the number of blocks: 1 is fastervlm. In an encoder of n blocks whose last is left out, as in LLaVA,
    the released `start_layer` is n - 1 - `layers`; it is given anew for each run there, so the default here is ours.
    """

    site = "encoder"
    keep: int | float = 128
    layers: int = 3
    combine: str = "sum"
    per: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_per(self.per)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(f"layers must be a number of encoder blocks, 1 or more, got {self.layers!r}.")
        if self.combine not in _COMBINE:
            raise ValueError(f'combine must be "sum", "min" or "max", got {self.combine!r}.')

    def needs(self) -> dict[str, Need]:
        earlier = {f"attention-{back}": ClassAttention(layer=-back) for back in range(2, self.layers + 1)}
        return {"attention": ClassAttention(layer=-1), **earlier}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        blocks = torch.stack([score_of(signals, name, "vtc-cls") for name in self.needs()])
        score = _COMBINE[self.combine](blocks, 0)
        return top_k(score, self.keep, tokens.mask, tokens.place, self.per)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep, self.per).count(n))
