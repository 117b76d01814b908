"""CATP: demonstrations with pictures are cut to what fits their own text, then to what the question turns to."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..method import LastAttention, Method, Need, PairedText, Promise, PromptNumber, Signals, check_keep, register
from ..ops.budget import allocate, count, counts
from ..ops.selection import best_of_units, facility_location, pack
from ..ops.similarity import cosine, normalise
from ..tokens import Reduction, Tokens
from ._common import check_layers, quota, read, score_of

READ = (Fraction(6, 32), Fraction(10, 32))  # the layers between which attention to pictures rises, as reported


@register(
    title="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    year=2025,
    source="arXiv:2508.07871",
    family="vlm",
    stage="layer",
    headline="77.8 % of image tokens removed in few-shot prompts, +0.6 % on average, 10.78 % less latency",
)
@dataclass(frozen=True)
class CATP(Method):
    """For prompts of several images with text between them (demonstrations and a question): prune by text, then by attention.

    Before the language model, each image by itself: greedily the set S that maximises
    balance · mean_i max_{j in S} cos(x_i, x_j) + (1 - balance) · mean_{j in S} cos(x_j, t), with t the mean embedding of the text
    between this image and the next one; behind the last image of a prompt it is the question.

    Behind the second of two `layers` a < b: Δ_j = max(0, A_b(j) - A_a(j)), A the attention of the prompt's last token, averaged
    over heads. Every image keeps one token, and the rest of what the images of a prompt keep is shared among them in proportion
    to the sums of Δ (equal where Δ is constant and images are alike). The last image keeps its tokens of highest Δ (where that is
    0, of highest A_b - A_a); the others those of highest
    mix · Δ_j / max Δ + (1 - mix) · cos(x_j, mean of the last image's tokens), from the hidden states behind layer b.

    `keep` is what an image keeps on average of its prompt (0.222: the paper's 77.8 % removed); `first` is the share of the
    removed tokens that leave before the language model. A fraction rounds twice. layers None are 6 and 10 of 32, scaled to the
    depth.

    No code is published, and of the paper the abstract and summaries were at hand: the form of both terms, `balance`, `first`,
    `mix`, the layers and the share by sums of Δ are ours.
    """

    site = "layer"
    keep: int | float = 0.222
    first: float = 0.5
    balance: float = 0.5
    mix: float = 0.5
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("first", "balance", "mix"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value!r}.")
        check_layers(self.layers, 2)

    def needs(self) -> dict[str, Need]:
        return {**self.parts()[0].needs(), **_Stage(1, self.mix, (None, None)).needs()}

    def parts(self) -> tuple[Method, ...]:
        return (_Early(self.keep, self.first, self.balance), self._layered)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """The selection in the language model, down to what is left at the end."""
        planned = tokens.count()[:, None]
        for part in self.parts():
            planned = part.planned(planned)  # type: ignore[attr-defined]
        step = _Stage(self.promise(len(tokens)).count, self.mix, (None, None))
        return step.reduce(tokens, {**(signals or {}), "quota": planned})

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._layered.steps(self.parts()[0].promise(n).count, depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        for part in self.parts():
            n = part.promise(n, depth).count
        return Promise(n, per="prompt")

    @property
    def _layered(self) -> _Layered:
        last = self.keep
        if isinstance(last, float):
            last = min(1.0, last / _share(last, self.first))
        return _Layered(self.keep, last, self.mix, self.layers)


@dataclass(frozen=True)
class _Early(Method):
    """The selection before the language model. keep: the budget of the whole."""

    site = "entry"
    keep: int | float
    first: float
    balance: float

    def needs(self) -> dict[str, Need]:
        return {"words": PairedText()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n = len(tokens)
        k = self.promise(n).count
        if k == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        words = read(signals, "words", "catp", "mean text embeddings (B, D)")
        fits = cosine(tokens.features, words[:, None])[..., 0]
        budget = self.planned(tokens.count()[:, None])
        return facility_location(tokens.features, k, fits, self.balance, None if tokens.mask is None else budget, tokens.mask)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.planned(n))

    def planned(self, n: Any) -> Any:
        """Tokens left of n, an int or a tensor of sizes."""
        if isinstance(self.keep, float):
            share = _share(self.keep, self.first)
            return counts(share, n) if isinstance(n, Tensor) else count(share, n)
        if isinstance(n, Tensor):
            return n - (self.first * (n - n.clamp(max=self.keep)).double()).round().long()
        return n - round(self.first * (n - min(n, self.keep)))


@dataclass(frozen=True)
class _Layered(Method):
    """The selection in the language model. keep: the budget of the whole; last: what is left of the tokens that enter."""

    site = "layer"
    keep: int | float
    last: int | float
    mix: float
    layers: tuple[int, int] | None

    def needs(self) -> dict[str, Need]:
        return _Stage(1, self.mix, (None, None)).needs()

    def steps(self, n: int, depth: int) -> list[Method | None]:
        a, b = self._read(depth)
        if not 0 <= a < b < depth - 1:
            raise ValueError(
                f"catp reads attention in layers {a} and {b} and prunes behind the second, but there are {depth} layers; choose "
                f"layers=(a, b) with 0 <= a < b < {depth - 1}."
            )
        step = _Stage(self.planned(n), self.mix, (a, b))
        return [step if layer == b + 1 else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.planned(n), per="prompt")

    def planned(self, n: Any) -> Any:
        """Tokens left on average of n that enter, an int or a tensor."""
        return counts(self.last, n) if isinstance(n, Tensor) else count(self.last, n)

    def _read(self, depth: int) -> tuple[int, int]:
        if self.layers is not None:
            return self.layers[0], self.layers[1]
        a, b = (round(depth * share) for share in READ)
        b = min(depth - 2, max(b, a + 1))
        return min(a, b - 1), b


@dataclass(frozen=True)
class _Stage(Method):
    """One selection. layers: those whose attention is compared."""

    site = "layer"
    keep: int
    mix: float
    layers: tuple[int | None, int | None]

    def needs(self) -> dict[str, Need]:
        before, after = self.layers
        return {"before": LastAttention(before), "after": LastAttention(after), "prompt": PromptNumber()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Without `prompt` every image is taken for a prompt of its own."""
        b, n, _ = tokens.features.shape
        if self.keep >= n and tokens.mask is None:
            return Reduction.identity(b, n, tokens.device)
        before, after = (score_of(signals, name, "catp") for name in ("before", "after"))
        rise = (after - before).masked_fill(~tokens.real, 0)
        row = torch.arange(b, device=tokens.device)
        number = signals.get("prompt", row) if signals else row
        together = number[:, None] == number
        budget = self._budget(rise, together, quota(signals, self.keep, tokens.count()[:, None])[:, 0], tokens.count())
        score = self._score(tokens, rise, together)
        chosen = best_of_units(score, torch.zeros_like(tokens.origin), budget[:, None], tokens.mask)
        if signals is not None and "prompt" in signals:
            return pack(chosen, n, ragged=True)
        return pack(chosen, self.keep, ragged=tokens.mask is not None)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n), per="prompt")

    def _budget(self, rise: Tensor, together: Tensor, planned: Tensor, sizes: Tensor) -> Tensor:
        """(B,) tokens each image keeps of what the images `together` (B, B) in its prompt keep; planned, sizes (B,)."""
        turned = rise.clamp(min=0).sum(1)
        spare = allocate(together * turned, together.long() @ (planned - 1).clamp(min=0), together * (sizes - 1).clamp(min=0))
        return spare.diagonal() + sizes.clamp(max=1)

    def _score(self, tokens: Tokens, rise: Tensor, together: Tensor) -> Tensor:
        """(B, N) by what each image ranks its tokens."""
        row = torch.arange(len(together), device=rise.device)
        last = torch.where(together, row, -1).amax(1)
        x = normalise(tokens.features)
        real = tokens.real[..., None].float()
        mean = (tokens.features.float() * real).nan_to_num().sum(1) / real.sum(1).clamp(min=1)
        like = (x * normalise(mean)[last][:, None]).sum(2)
        top = rise.clamp(min=0)
        top = top / top.amax(1, keepdim=True).clamp(min=1e-30)
        return torch.where((last == row)[:, None], rise, self.mix * top + (1 - self.mix) * like)


def _share(keep: float, first: float) -> float:
    """The share of tokens that the first selection leaves."""
    return 1 - first * (1 - keep)


for _part in (_Early, _Layered, _Stage):
    _part.card = CATP.card
