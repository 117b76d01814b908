"""Which text tokens of a prompt rate its images, and how they attend to them while a layer runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import attention, rotation
from ..tokens import gather
from .ahead import SLAB, query_rows, row_mask
from .flow import Cut, Flow
from .prompt import padded
from .words import prompt_number, text_columns


@dataclass(frozen=True)
class Raters:
    """Over the columns that came through the entrance: text (B, L) true at text tokens, at most `most` of a prompt; weight (R, L)
    what each counts in the mean over an image's raters. sample (R,): the prompt of each image."""

    text: Tensor
    weight: Tensor
    sample: Tensor
    most: int

    @classmethod
    def choose(cls, flow: Flow, embeds: Tensor, mask: Tensor | None, which: str = "relevant") -> Raters:
        """embeds (B, L, D) as they enter the language model, mask (B, L) true where no padding is. `which` of the text
        behind an image rates it: what is "relevant", or "all" of it."""
        batch, length, _ = embeds.shape
        layout, device = flow.layout, embeds.device
        here = torch.arange(length, device=device)
        text, sample = text_columns(flow, length, mask), prompt_number(flow)
        image = (flow.columns % length).masked_fill(flow.columns == batch * length, -1).amax(1, keepdim=True)
        behind = text[sample] & (here > image)
        shown = [0] * batch
        for number, count in zip(layout.sample, layout.album.counts, strict=True):
            shown[number] += count
        most = min(length, layout.length - min(shown))
        weight = behind.float() / behind.sum(1, keepdim=True).clamp(min=1)
        if which == "relevant":
            weight = _weights(flow, embeds, behind, _first(text, most)[sample])
        return cls(text, weight, sample, most)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float,
        flow: Flow,
        cut: Cut | None,
        *,
        peaks: bool = False,
        ranked: bool = False,
        softcap: float | None = None,
        ones: Tensor | None = None,
        strongest: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(R, keys) their attention in a layer that sees the columns of `cut`, averaged over heads, a slab of text at a time: the
        mean over raters, and with `peaks` the largest; `ranked`, also the rank (R, 1) of each image's matrix (raters, tokens). An
        image without text behind it is rated by the last token that is left of its prompt. `ones` (B, L, d), rotated as queries
        and keys are, takes the bias by position out; `strongest`: see `TextAttention`."""
        text, weight = self.text, self.weight
        if cut is not None:
            text, weight = text.gather(1, cut.index), weight.gather(1, cut.index[self.sample])
            text = text if cut.valid is None else text & cut.valid
        left = torch.nn.functional.pad(text.flatten(), (0, 1)).index_fill(0, flow.at.flatten(), True)[:-1].view_as(text)
        last = text.shape[1] - 1 - left.flip(1).to(torch.uint8).argmax(1, keepdim=True)
        columns = _first(text, self.most)
        real = torch.nn.functional.pad(text.gather(1, columns), (0, 1), value=True)
        weight = weight.gather(1, columns[self.sample])
        weight = torch.cat([weight, (weight.sum(1, keepdim=True) == 0).float()], 1)
        columns = torch.cat([columns, last], 1)
        everyone = torch.arange(query.shape[0], device=query.device)
        past = key.shape[2] - query.shape[2]
        mean = peak = torch.zeros(weight.shape[0], key.shape[2], device=query.device)
        each = mean[:, None]
        at, tables = flow.at % flow.length + past, []  # padding reads a text column, hidden below
        for start in range(0, columns.shape[1], SLAB):
            part = slice(start, start + SLAB)
            seen = row_mask(mask, key, past, everyone, columns[:, part])
            rows = attention.rows(query_rows(query, columns[:, part]), key, scale, seen, softcap=softcap)
            rows = rows.masked_fill(~real[:, None, part, None], 0)  # a row of padding may see no key at all
            if ones is not None:
                bias = rotation.bias(gather(ones, columns[:, part]), ones)[:, None]
                rows = torch.cat([rows[..., :past], rows[..., past:] / bias], -1)
            share = weight[:, None, part]
            if strongest is not None:
                each = each + (share[:, None] @ rows[self.sample])[:, :, 0]
                continue
            rows = rows.mean(1)[self.sample]
            mean = mean + (share @ rows)[:, 0]
            if peaks:
                peak = torch.maximum(peak, rows.masked_fill(share.mT == 0, 0).amax(1))
            if ranked:
                table = rows.gather(2, at[:, None].expand(-1, rows.shape[1], -1)).masked_fill(share.mT == 0, 0)
                shown = flow.scene.rows.mask
                tables.append(table if shown is None else table.masked_fill(~shown[:, None], 0))
        if strongest is not None:
            mean = _strongest(each, at, flow.scene.rows.mask, strongest)
        rank = torch.linalg.matrix_rank(torch.cat(tables, 1).float())[:, None] if ranked else None
        return mean, peak, rank


def _strongest(each: Tensor, at: Tensor, real: Tensor | None, heads: int) -> Tensor:
    """(R, keys) the mean over those `heads` of each (R, H, keys) in which an image's tokens, at (R, K), have most."""
    shown = each.gather(2, at[:, None].expand(-1, each.shape[1], -1))
    total = (shown if real is None else shown.masked_fill(~real[:, None], 0)).sum(2)
    most = total.argsort(dim=1, descending=True, stable=True)[:, :heads]
    return gather(each, most).mean(1)


def _first(chosen: Tensor, k: int) -> Tensor:
    """(B, k) the first columns where `chosen` (B, L), then others."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]


def _weights(flow: Flow, embeds: Tensor, behind: Tensor, columns: Tensor) -> Tensor:
    """(R, L) 1 / raters at the raters among the text `behind` (R, L) each image, which lies in columns (R, T)."""
    rows = flow.scene.rows
    sample = torch.tensor(flow.layout.sample, device=embeds.device)
    valid = behind.gather(1, columns)
    visual = padded(embeds.flatten(0, 1))[flow.at].float()
    words = gather(embeds[sample], columns).float()
    relevance = (visual @ words.mT).masked_fill(~valid[:, None], -torch.inf).softmax(2)
    if rows.mask is not None:
        relevance = relevance.masked_fill(~rows.mask[..., None], 0)
    relevance = relevance.sum(1)
    mean = relevance.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    above = valid & (relevance > mean)
    above = torch.where(above.any(1, keepdim=True), above, valid)
    share = above.float() / above.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros(behind.shape, device=embeds.device).scatter(1, columns, share)
