"""The text of a prompt as its images see it: which prompt an image stands in, and which words belong to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .flow import Flow


def prompt_number(flow: Flow) -> Tensor:
    """(R,) the prompt of each image."""
    return torch.tensor(flow.layout.sample, device=flow.columns.device)


def text_columns(flow: Flow, length: int, mask: Tensor | None) -> Tensor:
    """(B, length) true at text tokens, those between the tokens of one image left out. mask: the 2-D mask of the whole
    conversation."""
    batch = flow.layout.batch
    text = torch.ones(batch * length + 1, dtype=torch.bool, device=flow.columns.device)
    text[flow.columns.flatten()] = False
    text = text[:-1].view(batch, length)
    text = text if flow.between is None else text & ~flow.between
    return text & mask[:, -length:].bool() if mask is not None and mask.dim() == 2 else text


def paired_text(flow: Flow, embeds: Tensor, mask: Tensor | None) -> Tensor:
    """(R, D) float32 mean embedding of the text that belongs to each image; see `PairedText`. embeds (B, L, D)."""
    batch, length, _ = embeds.shape
    text, sample = text_columns(flow, length, mask), prompt_number(flow)
    here = torch.arange(length, device=embeds.device)
    nowhere = flow.columns >= batch * length
    column = flow.columns % length
    first = column.masked_fill(nowhere, length).amin(1, keepdim=True)
    last = column.masked_fill(nowhere, -1).amax(1, keepdim=True)
    words = text[sample]
    start = torch.where(words & (here > last), here, length).amin(1, keepdim=True)
    later = (sample[:, None] == sample) & (first.mT > start)
    end = torch.where(later, first.mT, length).amin(1, keepdim=True)
    own = words & (here >= start) & (here < end)
    own = torch.where(start < length, own, words).float()
    apart = own.new_zeros(len(sample), batch, length)  # one product for all prompts, each image seeing its own alone
    apart[torch.arange(len(sample), device=own.device), sample] = own
    return apart.flatten(1) @ embeds.flatten(0, 1).float() / own.sum(1, keepdim=True).clamp(min=1)
