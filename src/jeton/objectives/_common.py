"""What objectives share: choosing and replacing tokens, and cross-entropy in which tokens weigh differently."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def choose(candidates: Tensor, count: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, L) true at `count` (B,) of the `candidates` (B, L) of each row, drawn without replacement; all of them where there are
    fewer."""
    noise = torch.rand(candidates.shape, generator=generator, device=candidates.device).masked_fill(~candidates, 2.0)
    rank = noise.argsort(1).argsort(1)
    return (rank < count[:, None]) & candidates


def sample(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Tokens (...) drawn from softmax(logits / temperature) of (..., V), by the Gumbel-max rule; without gradient."""
    logits = logits.detach().float() / temperature
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    return (logits - (-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()).argmax(-1)


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V) and labels (B, L) of a causal model, aligned: the logits at t predict the label at t + 1."""
    return logits[:, :-1], labels[:, 1:]


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of weight times cross-entropy over the tokens that have a label (not -100), divided by their number. Logits (B, L, V),
    labels and weights (B, L), already aligned (see `shifted`). Zero where no token has a label."""
    valid = labels != IGNORE
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    if weights is not None:
        each = each * weights
    return (each * valid).sum() / valid.sum().clamp_min(1)


def probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, L) the probability that the aligned logits (B, L, V) give each label; 0 where there is none."""
    logp = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return logp.exp() * (labels != IGNORE)
