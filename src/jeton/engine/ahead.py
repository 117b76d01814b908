"""Attention of language-model layers for methods: heard while a layer ran, or computed ahead of the layer they stand in front of.

Only the rows that are asked for are computed; the layers keep their fast kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..needs import LastAttention, LayerKeys, Need, VisualAttention
from ..ops import attention
from ..tokens import gather
from .flow import Flow
from .prompt import Prompt

SLAB = 128


def is_ahead(need: Need) -> bool:
    return isinstance(need, VisualAttention | LayerKeys) or (isinstance(need, LastAttention) and need.ahead)


class Heard:
    """Attention over the columns of one layer: rows (B, H, keys), of which the first `past` keys were cached before this forward.
    Where visual tokens stand in the layer is remembered: some may be gone when a method reads."""

    def __init__(self, rows: Tensor, past: int, flow: Flow) -> None:
        self.rows, self.past = rows, past
        self.columns, self.length = flow.columns, flow.length

    def over(self, flow: Flow) -> Tensor:
        """(R, H, K) the attention over the remaining visual tokens."""
        at = self.columns.gather(1, flow.scene.rows.slot).clamp(max=self.rows.shape[0] * self.length - 1)
        return self.rows[at // self.length, :, at % self.length + self.past].movedim(-1, 1)


class Ahead:
    """Queries and keys of layer `number` for the tokens in front of it. mask: the layer's attention mask for them."""

    def __init__(
        self, prompt: Prompt, number: int, hidden: Tensor, embeddings: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> None:
        view = prompt.view
        layer = view.layers[number]
        self.prompt, self.mask, self.scale, self.softcap = prompt, mask, view.attention(layer).scaling, view.softcap(layer)
        self.q, new = view.queries_keys(layer, hidden, *embeddings)
        cached = None if prompt.cache is None or number >= len(prompt.cache.layers) else prompt.cache.layers[number].keys
        self.k = new if cached is None or cached.numel() == 0 else torch.cat([cached, new], 2)
        self.past = self.k.shape[2] - new.shape[2]

    def signal(self, need: Need) -> Tensor:
        """The signal over the remaining visual tokens."""
        flow = self.prompt.flow
        assert flow is not None
        if isinstance(need, LastAttention):
            last = self.prompt.last
            if last is None:
                last = torch.full((self.q.shape[0],), self.q.shape[2] - 1, device=self.q.device)
            return Heard(self._rows(self.q, last[:, None])[:, :, 0], self.past, flow).over(flow)
        at = flow.at.clamp(max=flow.layout.batch * flow.length - 1)
        sample, column = at // flow.length, at % flow.length
        if isinstance(need, LayerKeys):
            return self.k.mean(1)[sample, column + self.past]
        return self._visual(sample[:, 0], column)

    def _visual(self, sample: Tensor, column: Tensor) -> Tensor:
        """(R, K) mean attention from the K tokens of a row to each of them, a slab of queries at a time."""
        assert self.prompt.scene is not None
        rows = self.prompt.scene.rows.mask
        q, k = self.q[sample], self.k[sample]
        total = torch.zeros(column.shape, dtype=torch.float32, device=column.device)
        for start in range(0, column.shape[1], SLAB):
            part = column[:, start : start + SLAB]
            seen = attention.rows(query_rows(q, part), k, self.scale, self._mask(sample, part), softcap=self.softcap).mean(1)
            if rows is not None:
                seen = seen.masked_fill(~rows[:, start : start + SLAB, None], 0)
            total = total + gather(seen.sum(1), column + self.past)
        count = column.shape[1] if rows is None else rows.sum(1, keepdim=True).clamp(min=1)
        return total / count

    def _rows(self, q: Tensor, column: Tensor) -> Tensor:
        everyone = torch.arange(q.shape[0], device=q.device)
        return attention.rows(query_rows(q, column), self.k, self.scale, self._mask(everyone, column), softcap=self.softcap)

    def _mask(self, sample: Tensor, column: Tensor) -> Tensor:
        return row_mask(self.mask, self.k, self.past, sample, column)


def row_mask(mask: Any, k: Tensor, past: int, sample: Tensor, column: Tensor) -> Tensor:
    """(R, 1, r, keys) which of the keys k (B, Hk, keys, d) the query rows at column (R, r) of samples (R,) may see, under a
    layer's attention mask."""
    keys = torch.arange(k.shape[2], device=column.device)
    if mask is None or mask.dim() == 2:
        causal = (keys <= column[..., None] + past)[:, None]
        return causal if mask is None else causal & mask.bool()[sample][:, None, None]
    mask = mask[..., -k.shape[2] :]  # a layer with a window has the last keys only
    return gather(mask.expand(k.shape[0], -1, -1, -1)[sample].transpose(1, 2), column).transpose(1, 2)


def query_rows(q: Tensor, column: Tensor) -> Tensor:
    """q (R, H, L, d) at the columns (R, r)."""
    return gather(q.transpose(1, 2), column).transpose(1, 2)
