"""ReAGent: which tokens a prediction rests on, found by replacing some of them again and again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from .replacement import Sampler, from_lm, last_logits, replace_tokens

_AHEAD = 32  # steps for which replacements are drawn at once


class _Batch(NamedTuple):
    """Every replica's ids (N, L), mask, which tokens may be replaced, and target (N, 1)."""

    ids: Tensor
    mask: Tensor
    free: Tensor
    target: Tensor


@register(
    title="ReAGent: Towards A Model-agnostic Feature Attribution Method for Generative Language Models",
    year=2024,
    source="arXiv:2402.00794",
    family="measure",
    stage="attribution",
)
@dataclass(frozen=True)
class ReAGent:
    """How much each token of a prompt matters for the token a causal language model says next, without gradients.

    P0 = p(target | prompt). Scores g start uniform in [0, 1]. Every step replaces each token with probability `rate` by one that
    a sampler draws, and with d = P0 - p(target | replaced) adds logit((1 + d) / 2) to the scores of replaced tokens and subtracts
    it from those of the others. It stops when the target is among the model's `top` predictions with only the most important
    tokens left (`keep`: a share, or a count) and all others replaced, or after `steps`. Importance is softmax(g), averaged over
    the `replicas` that stopped, over all if none did; it sums to 1.

    The sampler is a function of `jeton.measure.replacement`, or one's own: (ids, mask) to weights (B, L, V). The paper's is a
    masked language model (RoBERTa; `from_masked_lm`), its code's a random word of the same part of speech (`by_class`); by
    default here the explained model itself says what else might stand there, which needs no second model. `special` ids are
    never replaced nor drawn. d is held `edge` away from -1 and 1 (ours), where the logit is infinite.

    ``ReAGent().explain(model, ids)`` explains the likeliest next token of each prompt, or a given `target`. For answers of
    several tokens, explain each with those before it as part of the prompt.
    """

    rate: float = 0.3
    top: int = 3
    keep: int | float = 0.7
    replicas: int = 5
    steps: int = 3000
    sampler: Sampler | None = None
    special: Collection[int] = ()
    edge: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} is the share of tokens replaced in a step; give a number between 0 and 1.")
        if not (0 < self.keep <= 1 if isinstance(self.keep, float) else self.keep >= 1):
            raise ValueError(f"keep={self.keep} must be a share in (0, 1] or a count of at least 1.")
        if min(self.top, self.replicas, self.steps) < 1:
            raise ValueError(f"top={self.top}, replicas={self.replicas} and steps={self.steps} must be at least 1.")

    @torch.no_grad()
    def explain(self, model: Any, ids: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, L) importance of the tokens of prompts ids (B, L) for the `target` (B,) that follows; 0 at padding, where `mask`
        (B, L) is false, and at special tokens."""
        if ids.dim() != 2:
            raise ValueError(f"ids must be (B, L), got {tuple(ids.shape)}.")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        special = torch.tensor(sorted(self.special), dtype=torch.long, device=ids.device)
        free = mask & ~torch.isin(ids, special)
        if not bool(free.any(1).all()):
            raise ValueError("a prompt has no token that may be replaced.")
        original = last_logits(model, ids, mask)
        target = original.argmax(-1) if target is None else target.to(ids.device)
        weights = (self.sampler or from_lm(model))(ids, mask).clone()
        weights[..., special] = 0
        n, r = len(ids), self.replicas
        many = _Batch(*(one.repeat_interleave(r, 0) for one in (ids, mask, free, target[:, None])))
        before = original.softmax(-1).gather(1, target[:, None]).repeat_interleave(r, 0)
        score, stopped = self._search(model, many, before, weights)
        score = score.masked_fill(~many.free, -torch.inf).softmax(1).view(n, r, -1)
        counted = stopped.view(n, r)
        counted = torch.where(counted.any(1, keepdim=True), counted, True)[..., None].float()
        return (score * counted).sum(1) / counted.sum(1)

    def update(self, score: Tensor, replaced: Tensor, drop: Tensor) -> Tensor:
        """Scores g (N, L) after a step that replaced some tokens (N, L) and lowered the target's probability by drop (N, 1)."""
        change = (0.5 + 0.5 * drop.clamp(self.edge - 1, 1 - self.edge)).logit()
        return score + torch.where(replaced, change, -change)

    def _search(self, model: Any, many: _Batch, before: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, L) and whether each replica stopped (N,). A step's replacement and the test of the step before share a
        pass of the model; replicas that have stopped are left out of the next ones."""
        generator = torch.Generator(weights.device).manual_seed(self.seed)
        n, length = many.ids.shape
        score = torch.rand(n, length, generator=generator, device=weights.device)
        stopped = torch.zeros(n, dtype=torch.bool, device=weights.device)
        count = many.free.sum(1, keepdim=True)
        kept_count = count.clamp(max=self.keep) if isinstance(self.keep, int) else (self.keep * count).ceil()
        for step in range(self.steps + 1):
            at = step % _AHEAD
            if at == 0:
                drawn = self._draw(weights, generator)
            active = (~stopped).nonzero()[:, 0]
            if not len(active):
                break
            ids, mask, free, target = (one[active] for one in many)
            rank = score[active].masked_fill(~free, -torch.inf).argsort(1, descending=True).argsort(1)
            tested = replace_tokens(ids, ~free | (rank < kept_count[active]), drawn[2 * at][active])
            replaced = free & (torch.rand(ids.shape, generator=generator, device=ids.device) < self.rate)
            tried = replace_tokens(ids, ~replaced, drawn[2 * at + 1][active])
            logits = last_logits(model, torch.cat([tested, tried]), mask.repeat(2, 1))
            there, then = logits.chunk(2)
            if step:
                stopped[active] = (there > there.gather(1, target)).sum(1) < self.top
            if step < self.steps:
                new = self.update(score[active], replaced, before[active] - then.softmax(-1).gather(1, target))
                score[active] = torch.where(stopped[active][:, None], score[active], new)
        return score, stopped

    def _draw(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """(2 * _AHEAD, N, L) replacements for the steps ahead."""
        b, length, size = weights.shape
        found = torch.multinomial(weights.reshape(-1, size), 2 * _AHEAD * self.replicas, replacement=True, generator=generator)
        return found.view(b, length, 2 * _AHEAD, self.replicas).permute(2, 0, 3, 1).reshape(2 * _AHEAD, -1, length)
