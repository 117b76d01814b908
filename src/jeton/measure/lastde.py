"""Lastde: machine text by how little the diversity of its token probabilities changes with scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import register
from .token_scores import encoded, token_scores


@register(
    title="Training-free LLM-generated Text Detection by Mining Token Probability Sequences",
    year=2024,
    source="arXiv:2410.06072",
    family="measure",
    stage="detection",
)
@dataclass(frozen=True)
class Lastde:
    """Score texts by a language model's log-probabilities of their tokens; higher means machine-written.

    x_t = log p(y_t | y_<t). At scale tau = 1..`scales` the series is smoothed by a moving mean of tau; its windows of length
    `window` are compared each with the next by cosine; DE = -sum p ln p / ln eps is the entropy of a histogram of these with
    eps = `bins` L equal bins over [-1, 1], L the number of x_t. Lastde = mean(x) / MDE with MDE the sample standard deviation of
    DE over scales.

    With `samples` (Lastde++) the score is standardised by that of as many alternative texts, each token drawn independently from
    the reference model's prediction given the original text in front of it: (s - mean) / std. The defaults are the paper's for
    open models; ``Lastde.closed()`` has those for closed ones and ``Lastde.plus()`` those of Lastde++.

    A flat series has MDE 0: it is taken to be at least `least` (ours), so that scores stay finite. A text needs `window` +
    `scales` predicted tokens. ``Lastde().detect(model, tokenizer, texts)`` scores texts, ``score(logp, mask)`` plain series.
    """

    window: int = 3
    bins: float = 10
    scales: int = 5
    samples: int = 0
    least: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.scales < 2 or self.samples < 0 or self.samples == 1:
            raise ValueError(f"{self!r}: window must be at least 1, scales 2, and samples 0 or 2 and more.")
        if not self.bins > 0:
            raise ValueError(f"bins={self.bins} per token must be positive.")

    @classmethod
    def closed(cls) -> Lastde:
        """For texts of closed models, scored by another one."""
        return cls(bins=1, scales=15)

    @classmethod
    def plus(cls, samples: int = 100) -> Lastde:
        """Lastde++."""
        return cls(window=4, bins=8, scales=15, samples=samples)

    def detect(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        reference: Any = None,
        batch: int = 16,
        length: int | None = None,
    ) -> Tensor:
        """(B,) scores of texts under the scoring `model`. `reference` draws the alternatives of Lastde++ (the model itself if not
        given); it must share the tokenizer. Texts are cut at `length` tokens."""
        found = []
        for number, (ids, mask) in enumerate(encoded(tokenizer, texts, batch, length)):
            ids, mask = ids.to(model.device), mask.to(model.device)
            scored = token_scores(model, ids, mask)
            if not self.samples:
                found.append(self.score(scored.logp, scored.mask))
                continue
            drawn = scored.logits if reference is None else token_scores(reference, ids, mask).logits
            found.append(self.discrepancy(scored.logits, drawn, ids[:, 1:], scored.mask, self.seed + number))
        return torch.cat(found).cpu() if found else torch.zeros(0)

    def score(self, logp: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) mean(x) / MDE of series (B, L); under `mask` (B, L) the real values of a row stand together."""
        if logp.dim() != 2:
            raise ValueError(f"logp must be (B, L), got {tuple(logp.shape)}.")
        x, count = _left(logp.float(), mask)
        if bool((count < self.window + self.scales).any()):
            short = int(count.min())
            raise ValueError(
                f"a text has {short} predicted tokens; with window={self.window} and scales={self.scales} Lastde needs "
                f"{self.window + self.scales}. Leave such texts out, or use fewer scales."
            )
        return x.sum(1) / count / self.spread(x, count).clamp(min=self.least)

    def spread(self, x: Tensor, count: Tensor) -> Tensor:
        """(B,) MDE of series (B, L) whose first count (B,) values are real."""
        return torch.stack([self.diversity(x, count, tau) for tau in range(1, self.scales + 1)]).std(0)

    def diversity(self, x: Tensor, count: Tensor, tau: int = 1) -> Tensor:
        """(B,) DE at one scale."""
        smooth = x.unfold(1, tau, 1).mean(2)
        windows = smooth.unfold(1, self.window, 1)
        likeness = F.cosine_similarity(windows[:, :-1], windows[:, 1:], dim=2)
        pairs = count[:, None] - (tau + self.window - 1)  # of neighbouring windows in each row
        real = torch.arange(likeness.shape[1], device=x.device) < pairs
        eps = (self.bins * count).round().long().clamp(min=2)[:, None]
        cell = ((likeness + 1) / 2 * eps).long().clamp(min=0).minimum(eps - 1)
        ordered = torch.where(real, cell, -1).sort(1).values  # padding first
        filled = ordered >= 0
        first = torch.cat([filled[:, :1], (ordered[:, 1:] != ordered[:, :-1]) & filled[:, 1:]], 1)
        run = first.long().cumsum(1)  # 1, 2, ...: the number of the bin among those in use; 0 is padding
        height = torch.zeros(len(x), run.shape[1] + 1, device=x.device).scatter_add(1, run, filled.float())[:, 1:]
        p = height / pairs
        return -torch.xlogy(p, p).sum(1) / eps[:, 0].log()

    def discrepancy(self, scoring: Tensor, reference: Tensor, labels: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
        """(B,) Lastde++ of texts `labels` (B, L) under logits (B, L, V) of the scoring and the reference model. Where
        vocabularies differ both are cut to the smaller."""
        size = min(scoring.shape[-1], reference.shape[-1])
        logp = scoring[..., :size].log_softmax(-1)
        if bool((labels[mask] >= size).any()):
            raise ValueError(f"the text has tokens outside the {size} that both models share; their tokenizers must be the same.")
        own = self.score(logp.gather(2, labels.clamp(max=size - 1)[..., None])[..., 0], mask)
        chance = reference[..., :size].softmax(-1)
        generator = torch.Generator(chance.device).manual_seed(seed)
        b, length = labels.shape
        drawn = torch.multinomial(chance.view(-1, size), self.samples, replacement=True, generator=generator)
        other = logp.gather(2, drawn.view(b, length, self.samples)).movedim(2, 1).reshape(-1, length)
        scores = self.score(other, mask.repeat_interleave(self.samples, 0)).view(b, self.samples)
        return (own - scores.mean(1)) / scores.std(1).clamp(min=self.least)


def _left(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's real values moved to the front, zeros behind them, and how many there are."""
    if mask is None:
        return x, torch.full((len(x),), x.shape[1], device=x.device)
    order = (~mask.bool()).long().argsort(dim=1, stable=True)
    return torch.where(mask, x, 0).gather(1, order), mask.sum(1)
