"""How near two kinds of tokens lie to each other, and how much tokens change from layer to layer: cosines of hidden states.

Letters: P perceptual tokens, T text tokens, S states (layers + 1), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ranking import spearman
from .similarity import normalise

VARIANTS = ("max", "mean", "median", "max_mean")


def of_means(perceptual: Tensor, text: Tensor) -> Tensor:
    """Cosine between the mean of perceptual tokens (..., P, D) and that of text tokens (..., T, D)."""
    return F.cosine_similarity(perceptual.float().mean(-2), text.float().mean(-2), dim=-1)


def of_tokens(perceptual: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Of the cosines of every perceptual token (P, D) with every text token (T, D): the largest, the mean, the median, and
    `max_mean`, the mean over perceptual tokens of the cosine with the text token nearest to each."""
    near = normalise(perceptual) @ normalise(text).mT
    return {"max": near.amax(), "mean": near.mean(), "median": near.median(), "max_mean": near.amax(1).mean()}


def consecutive(states: Tensor) -> Tensor:
    """(S - 1,) mean cosine of the same token in consecutive states (S, N, D)."""
    return F.cosine_similarity(states[1:].float(), states[:-1].float(), dim=-1).mean(1)


def correlation(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of two lists of numbers (N,), equal values sharing their mean rank."""
    if x.shape != y.shape or x.dim() != 1 or len(x) < 2:
        raise ValueError(
            f"a correlation takes two lists of at least two numbers, equally long, got {tuple(x.shape)}, {tuple(y.shape)}."
        )

    def of(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])

    return of(x, y), float(spearman(torch.stack([x, y]))[0, 1])
