"""Tokens that are masked instead of removed, so that what decides about them can be trained: the softmax under a policy, and
numbers that are rounded on the way forward only.

A policy (B, N) says with which weight each token is seen: 1 as it is, 0 not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, H, N, N) float32 attention in which keys of policy 0 take no part, except that every token sees itself.

    With w = exp(l - max l) m, where m is the policy of the key, or 1 for a query's own key: ``(w + eps / N) / (sum w + eps)``.
    Logits (B, H, N, N), policy (B, N). Differentiable in both. The ones policy gives softmax up to eps; the share eps is what
    hidden keys still have.
    """
    n = logits.shape[-1]
    assert logits.shape[-2] == n and policy.shape == (logits.shape[0], n), (
        f"logits must be (B, H, N, N) and policy (B, N), got {tuple(logits.shape)} and {tuple(policy.shape)}"
    )
    seen = policy.float()[:, None, None, :]
    seen = seen + (1 - seen) * torch.eye(n, device=logits.device)
    logits = logits.float()
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    return (weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())  # exactly `hard`: the difference is zero


def ceil(x: Tensor) -> Tensor:
    """Rounded up, with the gradient of x itself."""
    return straight_through(x.detach().ceil(), x)


def least(*numbers: Tensor) -> Tensor:
    """The smallest of some scalars; its gradient goes to each of them alike."""
    return straight_through(torch.stack([x.detach() for x in numbers]).amin(0), torch.stack(numbers).sum(0))


def gumbel_choice(logits: Tensor, temperature: float = 1.0, random: bool = True) -> Tensor:
    """One-hot choices along the last axis of logits (..., C), with the gradient of the softmax behind them: drawn by the
    Gumbel-max rule, or the likeliest where not `random`."""
    if random:
        logits = (logits - torch.empty_like(logits).exponential_().log()) / temperature
    return straight_through(F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype), logits.softmax(-1))
