"""Token pruning in vision state-space models: scores from the scan, and states that remember what is gone."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification

from ..ops.selection import top_k
from ..registry import register
from ..tokens import Reduction
from .vim import VimConfig, VimForImageClassification, Walk


class PrunedVimConfig(VimConfig):
    """`ratio` of the patches that stay at each of `layers` (after those blocks; None: after 1/4, 1/2 and 3/4 of the depth).
    `align`: what steps through the places of tokens that are gone: the "scan" alone, "all" (the convolution too), or "none"."""

    model_type = "jeton_pruned_vim"

    ratio: float = 0.7
    layers: list[int] | tuple[int, ...] | None = None
    align: str = "all"

    def __post_init__(self, **more: Any) -> None:
        super().__post_init__(**more)
        depth = self.num_hidden_layers
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is the share of patches that stay, in (0, 1], got {self.ratio!r}.")
        if self.layers is None:
            self.layers = sorted({max(1, depth * part // 4) - 1 for part in (1, 2, 3)})
        wrong = any(not 0 <= at < depth for at in self.layers) or any(b <= a for a, b in pairwise(self.layers))
        if wrong:
            raise ValueError(f"layers must list blocks of 0 to {depth - 1} in ascending order, got {self.layers!r}.")
        if self.align not in ("all", "scan", "none"):
            raise ValueError(f'align must be "all", "scan" or "none", got {self.align!r}.')

    def patches(self, n: int) -> list[int]:
        """Patches of n on which each block runs."""
        counts = []
        for number in range(self.num_hidden_layers):
            counts.append(n)
            if number in (self.layers or ()):
                n = self.stay(n)
        return counts

    def stay(self, n: int) -> int:
        """Patches of n that stay at a layer."""
        share = Fraction(str(self.ratio))
        return -(-n * share.numerator // share.denominator)


@register(
    title="Exploring Token Pruning in Vision State Space Models",
    year=2024,
    source="arXiv:2409.18962",
    family="vit",
    stage="backbone",
    headline="81.7 % on ImageNet-1K with 41.6 % fewer FLOPs of PlainMamba-L3",
    training_free=False,
)
class PrunedVim(VimForImageClassification):
    """A Vim that drops patches after some of its blocks, and whose scans know where they stood.

    Score of a token, from what the K scans of the block say of it, y (B, N, E) each, before the gate: S = sum over directions of
    mean over channels of max(0, y). The ceil(ratio T) best of T patches stay, in their order, and the class token always does.

    Removing a token brings its neighbours together, which a scan, unlike attention, takes for what the picture is. Aligned, the
    scan goes on over the places of tokens that are gone as if they were zeros: h_t = exp((Δ_t + g Δ_0) A) h_{t-1} + Δ_t B_t x_t,
    where g is the number of places missing in front of token t in that direction, and Δ_0 = softplus(bias), the step size that a
    zero would have. This is one more factor for each token and no longer scan. The convolution in front of the scan sees zeros
    at those places; with `align="scan"` it takes the tokens left for neighbours, with "none" the scan does so too. On digits,
    not fine-tuned, alignment gains only with the convolution aligned (see the recipe).

    Weights are a Vim's, by the same names: `PrunedVim.of(vim, ratio=0.7)` prunes one as it is, and is fine-tuned with the
    ordinary loss and saved with its settings. At ratio 1 it is that Vim. No code of the paper's method was published: Δ_0, the
    layers and the order of clipping and averaging are read from the text and from its authors' code of a sibling method.
    """

    config_class = PrunedVimConfig

    @classmethod
    def of(cls, vim: VimForImageClassification, **settings: Any) -> PrunedVim:
        """A Vim with these settings of `PrunedVimConfig`. Weights are not copied: they are the given model's own."""
        told = {**vim.config.to_dict(), **settings}
        told.pop("model_type")
        with torch.device("meta"):
            new = cls(PrunedVimConfig(**told))
        for name, part in (*vim.named_children(), *vim.named_parameters(recurse=False)):
            setattr(new, name, part)
        return new.train(vim.training)

    def reduce(self, layer: int, scanned: list[Tensor], index: Tensor) -> Reduction | None:
        if layer not in self.config.layers:
            return None
        patches = index.shape[1] - 1
        stay = self.config.stay(patches)
        if stay == patches:
            return None
        score = importance(scanned).masked_fill(index == self.config.middle, torch.inf)
        return top_k(score, stay + 1)

    def aligned(self, walk: Walk, at: Tensor, reduction: Reduction) -> Walk:
        if reduction.is_identity or self.config.align == "none":
            return walk
        return replace(walk, at=at, total=reduction.n, zeros=self.config.align == "all")


def importance(scanned: list[Tensor]) -> Tensor:
    """(B, N) S of what each direction's scan says of each token, (B, N, E) each: clipped, averaged over channels, added."""
    return torch.stack([y.float().clamp(min=0).mean(-1) for y in scanned]).sum(0)


AutoConfig.register(PrunedVimConfig.model_type, PrunedVimConfig, exist_ok=True)
AutoModelForImageClassification.register(PrunedVimConfig, PrunedVim, exist_ok=True)
