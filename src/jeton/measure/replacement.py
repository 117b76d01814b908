"""What stands in for a token, and how faithful an attribution is: what is left of a prediction without the rest, or without it.

A sampler says, for every place of ids (B, L) under a mask (B, L), with what weight each entry of the vocabulary may stand there
instead: (B, L, V), no need to sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Sampler = Callable[[Tensor, Tensor], Tensor]
KINDS = ("soft_ns", "soft_nc", "ns", "nc")


def uniform(size: int) -> Sampler:
    """Any entry of a vocabulary of `size`, all alike."""
    return lambda ids, mask: torch.ones(size, device=ids.device).expand(*ids.shape, size)


def by_frequency(counts: Tensor) -> Sampler:
    """Entries as often as they occur: counts (V,)."""
    return lambda ids, mask: counts.float().to(ids.device).expand(*ids.shape, len(counts))


def by_class(classes: Tensor) -> Sampler:
    """Any entry of the same class, such as the same part of speech: classes (V,) of integers."""
    return lambda ids, mask: (classes.to(ids.device) == classes.to(ids.device)[ids][..., None]).float()


def from_lm(model: Any) -> Sampler:
    """What a causal language model expects at each place after the text in front of it; at the first place any entry."""

    @torch.no_grad()
    def weights(ids: Tensor, mask: Tensor) -> Tensor:
        chance = last_logits(model, ids, mask, every=True).softmax(-1)
        return torch.cat([torch.ones_like(chance[:, :1]), chance[:, :-1]], 1)

    return weights


def from_masked_lm(model: Any, mask_id: int) -> Sampler:
    """What a masked language model with the same vocabulary expects at each place, that place masked and all others seen. Takes
    as many passes as there are places."""

    @torch.no_grad()
    def weights(ids: Tensor, mask: Tensor) -> Tensor:
        found = []
        for place in range(ids.shape[1]):
            hidden = ids.clone()
            hidden[:, place] = mask_id
            found.append(model(input_ids=hidden, attention_mask=mask.long()).logits[:, place].float().softmax(-1))
        return torch.stack(found, 1)

    return weights


def replace_tokens(ids: Tensor, keep: Tensor, other: Tensor) -> Tensor:
    """ids where `keep` is true, `other` elsewhere; all (..., L)."""
    return torch.where(keep, ids, other)


def last_logits(model: Any, ids: Tensor, mask: Tensor, embeds: Tensor | None = None, every: bool = False) -> Tensor:
    """(N, V) float logits after the last real token of each row, or after `every` token (N, L, V). Padding on either side."""
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    what = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    logits = model(**what, attention_mask=mask.long(), position_ids=place).logits.float()
    if every:
        return logits
    last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last]


@torch.no_grad()
def faithfulness(
    model: Any,
    ids: Tensor,
    importance: Tensor,
    kind: str = "soft_ns",
    *,
    mask: Tensor | None = None,
    share: float = 0.3,
    draws: int = 8,
    distance: str = "hellinger",
    seed: int = 0,
) -> Tensor:
    """(B,) how well importance (B, L) explains a causal language model's next-token distribution; higher is better.

    Sufficiency (ns) keeps what is important: each element of the embedding of token i stays with probability a_i, its importance
    divided by the row's largest, and is zero otherwise (soft), or the `share` most important tokens stay whole. With dist the
    distance of the next-token distribution from the original's, and s0 = 1 - dist of an input of zeros,
    NS = max(0, (1 - dist) - s0) / (1 - s0). Comprehensiveness (nc) takes away what is important, with 1 - a_i:
    NC = dist / (1 - s0). Means over `draws`. `distance` is Hellinger's, sqrt(sum (sqrt p - sqrt q)^2 / 2), or as in ReAGent's
    code ("released") sum (sqrt p - sqrt q)^2 / sqrt 2.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if distance not in ("hellinger", "released"):
        raise ValueError(f'distance must be "hellinger" or "released", got {distance!r}.')
    if importance.shape != ids.shape or bool((importance < 0).any()):
        raise ValueError(f"importance must be (B, L) = {tuple(ids.shape)} and not negative, got {tuple(importance.shape)}.")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    weight = torch.where(mask, importance.float(), 0)
    if kind.startswith("soft"):
        chance, draws = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny), draws
    else:
        count = (share * mask.sum(1, keepdim=True)).ceil()
        rank = weight.masked_fill(~mask, -1).argsort(dim=1, descending=True).argsort(dim=1)
        chance, draws = (rank < count).float(), 1
    if kind.endswith("nc"):
        chance = 1 - chance
    table = model.get_input_embeddings()(ids)
    original = last_logits(model, ids, mask, table).softmax(-1)
    nothing = _distance(original, last_logits(model, ids, mask, torch.zeros_like(table)).softmax(-1), distance)
    generator = torch.Generator(ids.device).manual_seed(seed)
    total = torch.zeros(len(ids), device=ids.device)
    for _ in range(draws):
        kept = torch.rand(table.shape, generator=generator, device=ids.device) < chance[..., None]
        apart = _distance(original, last_logits(model, ids, mask, table * kept).softmax(-1), distance)
        total += apart if kind.endswith("nc") else (nothing - apart).clamp(min=0)
    return total / draws / nothing.clamp(min=torch.finfo(torch.float32).eps)


def _distance(p: Tensor, q: Tensor, distance: str) -> Tensor:
    square = (p.sqrt() - q.sqrt()).square().sum(-1)
    return (square / 2).sqrt() if distance == "hellinger" else square / 2**0.5
