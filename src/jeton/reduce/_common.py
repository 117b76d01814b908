"""What several methods share: how they ask for and read attention as a score, and check the fields they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import ClassAttention, Need, ReceivedAttention, Signals, check_keep
from ..ops.budget import counts


def check_score(score: str) -> None:
    if score not in ("class", "received"):
        raise ValueError(f'score must be "class" (attention of the class token) or "received" (by each token), got {score!r}.')


def check_per(per: str) -> None:
    if per not in ("image", "crop", "frame"):
        raise ValueError(f'per must be "image", "crop" or "frame", got {per!r}.')


def check_ratio(ratio: object) -> None:
    """A share of the tokens; 1 may be written as an int."""
    if isinstance(ratio, int) and not isinstance(ratio, bool) and ratio != 1:
        raise ValueError(f"ratio={ratio} must be a fraction in (0, 1]; a number of tokens to keep is set with keep.")
    check_keep(1.0 if ratio == 1 and not isinstance(ratio, bool) else ratio, "ratio")


def attention(score: str, layer: int | None) -> Need:
    """The signal behind `score` at `layer`."""
    return ClassAttention(layer=layer) if score == "class" else ReceivedAttention(layer=layer)


def read(signals: Signals | None, name: str, who: str, what: str) -> Tensor:
    """A declared signal; without it the method cannot decide."""
    if signals is None or name not in signals:
        raise ValueError(f'{who} reads {what}: pass it as signals={{"{name}": ...}}, or apply {who} to a model.')
    return signals[name]


def score_of(signals: Signals | None, name: str, who: str) -> Tensor:
    """(B, N) float32 score from attention (B, H, N), averaged over heads, or (B, N) as it is."""
    attention = read(signals, name, who, "attention (B, heads, N) or (B, N)").float()
    return attention.mean(1) if attention.dim() == 3 else attention


def quota(signals: Signals | None, keep: int | float, real: Tensor) -> Tensor:
    """(B, 1) patches each row keeps in this step: what the engine planned where rows differ in length, else `keep` of `real`."""
    planned = signals.get("quota") if signals else None
    return counts(keep, real) if planned is None else torch.minimum(planned, real)
