"""GGeM: generalized mean pooling with an exponent for each group of channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import register
from ..tokens import Tokens

_LEAST, _MOST = 1e-2, 100.0


@register(
    title="Group Generalized Mean Pooling for Vision Transformer",
    year=2022,
    source="arXiv:2212.04114",
    family="vit",
    stage="head",
    headline="0.1 to 0.7 points more than class token, average, max or GeM pooling with ViT-B and ViT-L on ImageNet-1K",
    training_free=False,
)
class GGeM(nn.Module):
    """Tokens to one vector: each channel's generalized mean, with an exponent that its group of channels learns.

    f_c = (sum_n s_n max(x_nc, eps)^p / sum_n s_n)^(1/p), p = p_g of the group g of D / G consecutive channels that c lies in, s_n
    the size of token n (1 where nothing was merged; our extension, so that merging equal tokens changes nothing). p = 1 is the
    mean of the clamped values, p to infinity their maximum. Computed in float32 as a log-sum-exp. p is kept in 0.01 to 100.

    Clamping takes away what is negative, behind a layer norm half of all values: pool in front of the model's final norm and
    train with it. It is not for a frozen head. No public code was found: this follows the paper's formula. Its first p is not
    confirmed; 3 is usual in retrieval, 1 begins as the average.

    width D and groups G (the paper: as many as attention heads; 1 is GeM). Raises ValueError where G does not divide D.
    """

    def __init__(self, width: int, groups: int, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"{groups} groups do not divide {width} channels; use the number of attention heads.")
        if not _LEAST < p < _MOST:
            raise ValueError(f"p={p} is not between {_LEAST} and {_MOST}.")
        self.width, self.groups, self.eps = width, groups, eps
        # p = least + softplus(raw) stays positive wherever training goes; as a vector it has no weight decay in jeton.train
        self.raw = nn.Parameter(torch.full((groups,), math.log(math.expm1(p - _LEAST))))

    @property
    def p(self) -> Tensor:
        """(G,) the exponents."""
        return (_LEAST + F.softplus(self.raw.float())).clamp(max=_MOST)

    def forward(self, tokens: Tokens | Tensor, size: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, D) of patch tokens (B, N, D); size (B, N) and mask (B, N) where given. Of `Tokens` these are their own, and the
        special tokens in front take no part."""
        if isinstance(tokens, Tokens):
            front = tokens.prefix
            size = None if tokens.size is None else tokens.size[:, front:]
            mask = None if tokens.mask is None else tokens.mask[:, front:]
            tokens = tokens.features[:, front:]
        if tokens.shape[-1] != self.width:
            raise ValueError(f"this pooling takes tokens {self.width} wide, got {tuple(tokens.shape)}.")
        weight = torch.ones(tokens.shape[:2], device=tokens.device) if size is None else size.float()
        weight = weight if mask is None else weight.masked_fill(~mask, 0)
        p = self.p.repeat_interleave(self.width // self.groups)
        powers = tokens.float().clamp(min=self.eps).log() * p + weight.log()[..., None]
        mean = powers.logsumexp(1) - weight.sum(1).log()[:, None]
        return (mean / p).exp().to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, groups={self.groups}"
