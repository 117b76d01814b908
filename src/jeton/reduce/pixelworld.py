"""PEAP-Fast of PixelWorld: blank patches of a rendered page never enter the encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import Budget, Method, Need, PixelVariance, Promise, Signals, check_keep, register
from ..ops.budget import count
from ..ops.ranking import rank
from ..ops.selection import pack, top_k
from ..tokens import Reduction, Tokens
from ._common import quota, read


@register(
    title="PixelWorld: How Far Are We from Perceiving Everything as Pixels?",
    year=2025,
    source="arXiv:2501.19339",
    family="vlm",
    stage="pixels",
    headline="pixels help on multimodal sets and lose on reasoning and code; dropping blank patches saves much of the overhead",
)
@dataclass(frozen=True)
class PixelWorld(Method):
    """Drop what is blank: tokens whose patches hardly vary.

    v_p of a patch: the unbiased variance of each channel over time and pixels, of pixels as the processor normalises them,
    averaged over channels. A token made of several patches has the largest v_p of them (in Qwen2-VL a group of 2 x 2), so ink
    anywhere in it keeps it. Without `keep`, all tokens with v > `threshold` stay, and the first one of a picture that is blank
    throughout; with `keep`, the K of largest v, ties to the lower index, whatever the threshold.

    In Qwen2-VL and Qwen2.5-VL whole groups leave before the encoder and everything else stays as it was in the whole grid:
    positions, frames, windows. In encoders with one patch a token (CLIP, SigLIP, ViT, DINOv2 and the LLaVA models on them whose
    patches are not mixed) patches leave in front of the first block. The threshold is about normalised pixels and shifts with
    the processor's standard deviation.
    """

    site = "pixels"
    point = "before"
    keep: int | float | None = None
    threshold: float = 0.01

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold is a variance of normalised pixels, 0 or more, got {self.threshold!r}.")

    def needs(self) -> dict[str, Need]:
        return {"variance": PixelVariance()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        variance = read(signals, "variance", "pixelworld", "the variance of each token's pixels (B, N)").float()
        n, prefix, mask = len(tokens), tokens.prefix, tokens.mask
        special = torch.arange(n, device=tokens.device) < prefix
        if self.keep is None:
            return Reduction.select(self._inked(variance, tokens.real & ~special) | special, prefix=prefix)
        if mask is None:
            return top_k(variance, self.keep, prefix=prefix)
        score = torch.where(special, torch.inf, variance).masked_fill(~mask, -torch.inf)
        stay = prefix + quota(signals, self.keep, tokens.count()[:, None] - prefix)
        return pack((rank(score) < stay) & mask, prefix + count(self.keep, n - prefix), ragged=True, prefix=prefix)

    def _inked(self, variance: Tensor, real: Tensor) -> Tensor:
        """(B, N) true above the threshold; of a row without any, its first token."""
        inked = (variance > self.threshold) & real
        first = real & (real.cumsum(1) == 1)
        return torch.where(inked.any(1, keepdim=True), inked, first)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        """In front of block 0."""
        first = self if self.keep is None else replace(self, keep=Budget(self.keep).count(n))
        return [first, *[None] * (depth - 1)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False) if self.keep is None else Promise(Budget(self.keep).count(n))
