"""Hearing language-model layers while they run: what methods in front of later ones read of them, for the visual tokens that are
left by then."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..needs import (
    LastAttention,
    LastSimilarity,
    LayerValues,
    Need,
    NeuronCounts,
    Neurons,
    PageRank,
    RaterRank,
    TextAttention,
)
from ..ops import attention, neurons
from ..ops.pagerank import importance, pagerank
from ..tokens import gather
from .ahead import Heard, row_mask
from .aside import aside
from .prompt import Prompt
from .raters import Raters
from .tap import Listener

IN_ATTENTION = (LastAttention, LastSimilarity, LayerValues, PageRank, TextAttention, RaterRank)


class Hearing:
    """What is heard in one forward that brings pictures, by layer; `asked`: what is wanted of each."""

    def __init__(self, prompt: Prompt, asked: dict[int, set[Need]]) -> None:
        self.prompt, self.asked = prompt, asked
        self.which = {need.raters for needs in asked.values() for need in needs if isinstance(need, TextAttention | RaterRank)}
        self.raters: dict[str, Raters] = {}
        self.rows: dict[tuple[int, Need], Heard] = {}
        self.fired: dict[tuple[int, float], Tensor] = {}
        # by layer and need: (R, L), where visual tokens stood, and of how many columns
        self.rated: dict[tuple[int, TextAttention], tuple[Tensor, Tensor, int]] = {}
        self.ranks: dict[tuple[int, str], Tensor] = {}
        self.rotary: tuple[Tensor, Tensor] | None = None  # of the layer that runs, where a listener asks for it

    def attach(self) -> None:
        view, run = self.prompt.view, self.prompt.run
        for number, layer in enumerate(view.layers):
            needs = self.asked.get(number, set())
            if any(isinstance(need, IN_ATTENTION) for need in needs):
                run.taps.listen(view.attention(layer), _Listener(self, number, needs))
            tops = {need.top for need in needs if isinstance(need, Neurons | NeuronCounts)}
            if tops:
                run.hook(view.gated(layer).down.register_forward_pre_hook(functools.partial(self._fire, number, tops)))
            if any(isinstance(need, TextAttention) and need.unbiased for need in needs):
                run.hook(layer.register_forward_pre_hook(self._turned, with_kwargs=True))

    def begin(self, embeds: Tensor | None) -> None:
        """A forward starts; embeds (B, L, D) enter the language model, at least where pictures come in."""
        for old in (self.rows, self.fired, self.rated, self.ranks, self.raters):
            old.clear()
        prompt = self.prompt
        if self.which and prompt.flow is not None:
            assert embeds is not None
            with prompt.run.clock.measure("selection"):
                self.raters.update({which: Raters.choose(prompt.flow, embeds, prompt.real, which) for which in self.which})

    @aside
    def _turned(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.rotary = kwargs["position_embeddings"]

    @aside
    def _fire(self, number: int, tops: set[float], module: nn.Module, args: tuple) -> None:
        """The gated activations of a layer's MLP are on their way into its last projection."""
        if self.prompt.flow is not None:
            with self.prompt.run.clock.measure("selection"):
                self.fired.update({(number, top): neurons.positive(args[0], top) for top in tops})

    def signal(self, layer: int, need: Need) -> Tensor | None:
        """What was heard of a layer, for the visual tokens left; None for needs that are not heard."""
        flow, found = self.prompt.flow, self.rows.get((layer, need))
        assert flow is not None
        if found is not None:
            signal = found.over(flow)
            return signal if need.heads else signal.movedim(1, -1) if isinstance(need, LayerValues) else signal[:, 0]
        if isinstance(need, TextAttention):
            rated, columns, length = self.rated[layer, need]
            at = columns.gather(1, flow.scene.rows.slot)
            return rated.gather(1, (at % length).clamp(max=rated.shape[1] - 1))
        if isinstance(need, RaterRank):
            return self.ranks[layer, need.raters]
        if isinstance(need, Neurons | NeuronCounts):
            return self._activated(self.fired[layer, need.top], need)
        return None

    def _activated(self, fired: Tensor, need: Neurons | NeuronCounts) -> Tensor:
        flow = self.prompt.flow
        assert flow is not None
        at = flow.at.clamp(max=flow.layout.batch * flow.length - 1)
        sample, column = at // flow.length, at % flow.length
        if isinstance(need, NeuronCounts):
            return neurons.counts(fired, self.prompt.real)[sample[:, 0]]
        if need.token is None:
            return fired[sample, column]
        last = self.prompt.last
        last = torch.full_like(sample[:, 0], fired.shape[1] - 1) if last is None else last[sample[:, 0]]
        return fired[sample[:, 0], (last + 1 - need.token).clamp(min=0)]


class _Listener(Listener):
    """Hears the attention of one layer while pictures come in: the last token's, that of the text, its PageRank, or values."""

    def __init__(self, hearing: Hearing, number: int, needs: set[Need]) -> None:
        self.hearing, self.number, self.needs = hearing, number, needs
        self.kinds = set(map(type, needs))
        self.text = [need for need in needs if isinstance(need, TextAttention)]
        self.ranks = [need for need in needs if isinstance(need, RaterRank)]

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        prompt, softcap = self.hearing.prompt, extra.get("softcap")
        if prompt.flow is None:
            return
        past = key.shape[2] - query.shape[2]
        with prompt.run.clock.measure("selection"):
            self._rate(query, key, mask, scale, softcap)
            for need in self.needs:
                if isinstance(need, LayerValues):
                    self._hear(need, value[:, :, past:].mean(1).transpose(1, 2))
                elif isinstance(need, PageRank):
                    self._hear(need, self._ranks(need, query, key, mask, scale, softcap)[:, None])
            if self.kinds & {LastAttention, LastSimilarity}:
                self._hear_last(query, key, value, mask, scale, softcap)

    def _rate(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> None:
        """Attention of the text that rates an image, once for all needs that read it alike."""
        hearing, prompt = self.hearing, self.hearing.prompt
        flow, stage, past = prompt.flow, prompt.stage, key.shape[2] - query.shape[2]
        assert flow is not None
        asked = {(need.raters, need.unbiased, need.strongest): None for need in self.text}
        for which, unbiased, strongest in {**asked, **{(need.raters, False, None): None for need in self.ranks}}:
            needs = [each for each in self.text if (each.raters, each.unbiased, each.strongest) == (which, unbiased, strongest)]
            plain = not unbiased and strongest is None
            *both, rank = hearing.raters[which].attention(
                query,
                key,
                mask,
                scale,
                flow,
                None if stage is None else stage.cut,
                peaks=any(need.peak for need in needs),
                ranked=plain and any(need.raters == which for need in self.ranks),
                ones=self._ones(query) if unbiased else None,
                strongest=strongest,
                softcap=softcap,
            )
            if rank is not None:
                hearing.ranks[self.number, which] = rank
            for need in needs:
                hearing.rated[self.number, need] = (both[need.peak][:, past:], flow.columns, flow.length)

    def _hear_last(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> None:
        """What the last token of each prompt sees, by queries and keys or by values."""
        past, last = key.shape[2] - query.shape[2], self.hearing.prompt.last
        if last is None:  # (B,) among the new ones
            last = query.new_full((query.shape[0],), query.shape[2] - 1, dtype=torch.long)
        if mask is not None:
            mask = mask[:, None, None].bool() if mask.dim() == 2 else _row(mask, last)
        for kind, states, others, at, cap in (
            (LastAttention, query, key, last, softcap),
            (LastSimilarity, value, value, last + past, None),
        ):
            if kind in self.kinds:
                rows = attention.rows(_row(states, at), others, scale, mask, softcap=cap)[:, :, 0]
                for need in self.needs:
                    if isinstance(need, kind):
                        self._hear(need, rows, past)

    def _ones(self, query: Tensor) -> Tensor:
        """(B, L, d) a vector of ones, rotated to the position of every column of this forward."""
        view, rotary = self.hearing.prompt.view, self.hearing.rotary
        assert rotary is not None
        cos, sin = (part.float().expand(query.shape[0], -1, -1) for part in rotary)
        ones = torch.ones_like(query[:, :1], dtype=torch.float32)
        return view.rotated(view.layers[self.number], ones, cos, sin)[:, 0]

    def _hear(self, need: Need, rows: Tensor, past: int = 0) -> None:
        assert self.hearing.prompt.flow is not None
        self.hearing.rows[self.number, need] = Heard(rows, past, self.hearing.prompt.flow)

    @torch.no_grad()
    def _ranks(
        self, need: PageRank, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """(B, L) over this forward's columns. Keys cached before only receive, as nothing attends to what is behind it."""
        batch, heads, length, _ = query.shape
        past, everyone = key.shape[2] - length, torch.arange(batch, device=query.device)
        real = self.hearing.prompt.real
        real = query.new_ones(batch, length, dtype=torch.bool) if real is None else real

        def rows(begin: int, stop: int) -> Tensor:
            keys = key[:, :, : past + stop]
            if mask is None or mask.dim() == 2:
                column = torch.arange(begin, stop, device=key.device).expand(batch, -1)
                seen = row_mask(None if mask is None else mask[:, : past + stop], keys, past, everyone, column)
            else:
                seen = mask[:, :, begin:stop, : past + stop]
            cap = None if softcap is None else softcap / need.temperature
            share = attention.rows(query[:, :, begin:stop], keys, scale / need.temperature, seen, softcap=cap)[..., past:]
            return share.masked_fill(~real[:, None, begin:stop, None], 0)  # a row of padding may see no key at all

        return importance(pagerank(rows, real / real.sum(1, keepdim=True), heads, need.rounds, need.block))


def _row(x: Tensor, at: Tensor) -> Tensor:
    """(B, H, 1, n) one row of x (B or 1, H, L, n) for each sample, at (B,)."""
    return gather(x.expand(at.shape[0], -1, -1, -1).transpose(1, 2), at[:, None]).transpose(1, 2)
