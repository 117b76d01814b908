"""What encoder signals are: how each is taken from one attention call or from what the encoder hands out, and how it is laid out
on tokens that have left since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..needs import (
    AnchorAttention,
    ClassAttention,
    ClassLikeness,
    ClassSimilarity,
    Keys,
    MeanAttention,
    Need,
    ReceivedAttention,
    TextSimilarity,
    Values,
)
from ..ops import attention, similarity
from ..tokens import Reduction, Tokens


def measure(
    need: Need,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    real: Tensor | None,
    scale: float,
) -> Tensor:
    """One signal from one attention call."""
    if getattr(need, "joined", False):
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
        scale = query.shape[-1] ** -0.5
    first = None if mask is None else mask[:, :, :1]
    if isinstance(need, ClassAttention):
        return attention.rows(query[:, :, :1], key, scale, first, logits=need.logits)[:, :, 0]
    if isinstance(need, MeanAttention):
        return attention.rows(_mean_row(query, real), key, scale, _mean_mask(mask, real))[:, :, 0]
    if isinstance(need, ClassSimilarity):
        return attention.rows(value[:, :, :1], value, 1.0, first)[:, :, 0]
    if isinstance(need, ReceivedAttention):
        return attention.received(query, key, scale, real, bias=mask)
    if isinstance(need, AnchorAttention):
        return attention.anchored(query, key, need.threshold, scale, real, bias=mask)
    if isinstance(need, Keys):
        return key.mean(1)
    if isinstance(need, Values):
        return value.mean(1)
    raise TypeError(f"{need} cannot be read in an encoder.")


def features_of(output: Any) -> Tensor:
    """(B, N, D) the tokens of a module's output, which is or starts with them."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def of_output(need: Need, hidden: Tensor) -> Tensor:
    """One signal from what the encoder hands out, special tokens included."""
    if isinstance(need, ClassLikeness):
        return similarity.to_first(hidden, need.metric)
    assert isinstance(need, TextSimilarity) and need.tower is not None
    return need.tower.similarity(hidden, need.questions, need.end, need.normed)


def _mean_row(query: Tensor, real: Tensor | None) -> Tensor:
    """(B, H, 1, d) the mean of the queries of real tokens."""
    if real is None:
        return query.float().mean(2, keepdim=True)
    shown = query.float().masked_fill(~real[:, None, :, None], 0)
    return shown.sum(2, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None, None]


def _mean_mask(mask: Tensor | None, real: Tensor | None) -> Tensor | None:
    """The mask of the mean query: a bias that differs by query is averaged over real tokens as the logits are."""
    if mask is None or mask.dtype == torch.bool or mask.shape[2] == 1:
        return None if mask is None else mask[:, :, :1]
    if real is None:
        return mask.float().mean(2, keepdim=True)
    shown = mask.float().masked_fill(~real[:, None, :, None], 0).sum(2, keepdim=True)
    return shown / real.sum(1).clamp(min=1)[:, None, None, None]


def tokens_last(need: Need, value: Tensor) -> Tensor:
    return value.transpose(1, 2) if value.dim() == 3 and (not need.heads or isinstance(need, TextSimilarity)) else value


def restored(value: Tensor, need: Need, reduction: Reduction) -> Tensor:
    """A signal of the tokens that a reduction made, for those it was made of."""
    first = tokens_last(need, value).movedim(-1, 1)
    flat = reduction.restore(Tokens(first.flatten(1).unflatten(1, (first.shape[1], -1)))).features
    back = flat.reshape(first.shape[0], reduction.n, *first.shape[2:])
    return back.movedim(1, -1) if value.dim() > 2 and need.heads else back


def spread(value: Tensor, index: Tensor, n: int) -> Tensor:
    out = value.new_zeros(value.shape[0], n, *value.shape[2:])
    shape = index.shape + (1,) * (value.dim() - 2)
    return out.scatter(1, index.reshape(shape).expand_as(value), value)
