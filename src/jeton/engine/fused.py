"""The attention of a block with the map of the tokens there were in front of it, fused as they were."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..ops import attention
from ..tokens import Reduction, Tokens
from .tap import Attention, add_bias

Timed = Callable[[], AbstractContextManager[None]]


class MapAhead:
    """Queries and keys of the tokens in front of a block, and the reduction that came between them and its attention."""

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    map: Tensor | None = None
    reduction: Reduction | None = None
    drops: bool = False

    def hear(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Take queries (B, H, N, d) and keys of the tokens as they are."""
        self.query, self.key, self.mask, self.scale = query, key, mask, scale

    def draw(self) -> None:
        """Compute the map now, in float32, for a signal that needs all of it: the block's attention then takes it from here. Only
        where it is no larger than what an MLP of four times the width holds, N <= 4 d; else the signal is read in slabs."""
        if self.query.shape[2] <= 4 * self.query.shape[3]:
            self.map = attention.drawn(self.query, self.key, self.scale, self.mask)
            del self.query, self.key

    def reduced(self, reduction: Reduction) -> None:
        """One more reduction came in between. Only one that merges and comes alone is known to leave no token without a group."""
        self.drops = reduction.is_drop or self.reduction is not None
        self.reduction = reduction if self.reduction is None else self.reduction.then(reduction)

    def attend(self, original: Attention, value: Tensor, drop: float = 0.0, timed: Timed = nullcontext) -> Tensor:
        """(B, K, H, d) the map A of the N tokens there were, fused as they were, times values (B, H, K, d) of those there are.

        Columns of a group are added and rows mixed as features were, R A C V; C V is each token's group's value, so that A is
        used as it is, where it was drawn, or not stored: fast attention runs on the N tokens. Rows of what comes out are mixed.
        What tokens that were dropped would have been given is shared by the others, as a softmax without them does.
        `timed` is around what merging adds to the block's own work.
        """
        assert self.reduction is not None
        with timed():
            each = self.reduction.restore(Tokens(value.transpose(1, 2).flatten(2))).features
            each = each.unflatten(2, (value.shape[1], -1)).transpose(1, 2)
        mixed = self._through(original, each, drop)
        del each
        with timed():
            return self.reduction.mix(mixed)

    def _through(self, original: Attention, each: Tensor, drop: float) -> Tensor:
        """(B, N, H, d) A times values of its own tokens; a drawn map is let go of."""
        assert self.reduction is not None
        gone = (self.reduction.assign < 0)[:, None, None] if self.drops else None
        if self.map is None:
            hidden = None if gone is None else each.new_zeros(gone.shape).masked_fill(gone, torch.finfo(each.dtype).min)
            mask = self.mask if hidden is None else add_bias(self.mask, hidden)
            return original(self.query, self.key, each, mask)[0]
        drawn, self.map = self.map.to(each.dtype), None
        if gone is not None:
            drawn = drawn.masked_fill(gone, 0)
            drawn = drawn / drawn.sum(-1, keepdim=True)
        return attention.mixed(dropout(drawn, drop), each).transpose(1, 2)
