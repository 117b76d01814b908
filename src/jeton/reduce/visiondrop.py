"""VisionDrop: dominant and contextual tokens, selected in the encoder and again between the stages of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from ..method import Keys, LayerKeys, Method, Need, Promise, Signals, VisualAttention, check_keep, register
from ..ops import anchors
from ..ops.budget import count, counts
from ..tokens import Reduction, Tokens
from ._common import attention, check_layers, check_score, quota, read, score_of, stages

STAGES = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
FIRST, LAST = (42, 6), (16, 3)  # dominant and contextual tokens that the encoder hands on and that the last stage leaves
ZIP = (54, 10)  # the same for an encoder that is the only stage
Counts = tuple[int, int]


@register(
    title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
    year=2025,
    source="arXiv:2506.22283",
    family="vlm",
    stage="layer",
    headline="LLaVA-NeXT-7B: 95.71 % of performance, 2.7 times lower latency, 6 times fewer FLOPs",
)
@dataclass(frozen=True)
class VisionDrop(Method):
    """Select by visual attention alone: once in the encoder, as VisionZip does, and again in front of some language-model layers.

    A selection keeps the tokens of highest score (dominant); of the others every floor(M / contextual)-th is an anchor, each
    other one goes to the anchor with the most similar key, and anchor <- anchor + mean(assigned). In the encoder the score is the
    class token's attention (`score` "received": what each patch receives). In front of layer l it is the attention that the
    tokens of the image pay each other in layer l, over all keys, averaged over heads and over these queries; keys are those of
    layer l after RoPE, averaged over heads. No text takes part.

    `keep` is what the last stage leaves; on the way there tokens go by equal shares, from keep · 48 / 19 in the encoder, and a
    share between 6 of 48 and 3 of 19 of them is contextual: 19 is the paper's 42 + 6, then 30 + 5, 22 + 4, 16 + 3 tokens from
    layers 8, 16 and 24 of 32 on, 32 on average. A published budget that is an average is thus larger than `keep`. A fraction
    rounds twice and may end one token beside it. `counts` sets all pairs by hand, the encoder's first; `layers` None means 1/4,
    1/2 and 3/4 of the depth, and () is VisionZip alone. An image is one set of tokens in the language model, crops included; each
    image has its own budget. Under the causal mask early tokens are seen by more queries; `debias` divides each score by the
    number of queries that can see the token (the paper does not).

    The release renumbers positions: that is positions="compact" of `apply`.
    """

    site = "layer"
    newlines = "drop"
    keep: int | float = 19
    layers: tuple[int, ...] | None = None
    counts: tuple[Counts, ...] | None = None
    score: str = "class"
    debias: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_score(self.score)
        check_layers(self.layers)
        if self.counts is None:
            return
        for pair in self.counts:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"counts lists pairs of dominant and contextual tokens, e.g. (42, 6), got {pair!r}.")
            check_keep(sum(pair), "dominant + contextual")
        if any(sum(after) > sum(before) for before, after in pairwise(self.counts)):
            raise ValueError(f"counts={self.counts!r} grows from one stage to the next, but tokens that went do not come back.")
        if len(self.counts) != 1 + self._stages:
            raise ValueError(
                f"counts={self.counts!r} should have {1 + self._stages} pairs, for the encoder and for each stage after it."
            )

    def needs(self) -> dict[str, Need]:
        encoder = {"class": attention(self.score, layer=-1), "patches": Keys(layer=-1)}
        return {**encoder, "attention": VisualAttention(), "keys": LayerKeys()}

    def parts(self) -> tuple[Method, ...]:
        return (self._encoder, self._layered) if self._stages else (self._encoder,)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """One selection between two layers, down to what the last stage leaves."""
        planned = tokens.count()[:, None]
        for part in self.parts():
            planned = counts(part.last, planned)
        step = self._layered.stage(self.promise(len(tokens)).count, -1)
        return step.reduce(tokens, {**(signals or {}), "quota": planned})

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._layered.steps(self._encoder.promise(n).count, depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        for part in self.parts():
            n = part.promise(n, depth).count
        return Promise(n)

    @property
    def _stages(self) -> int:
        return len(STAGES if self.layers is None else self.layers)

    @property
    def _encoder(self) -> _Encoder:
        if self.counts is not None:
            return _Encoder(None, sum(self.counts[0]), self.counts[0][1], self.score)
        if not self._stages:
            return _Encoder(self.keep, self.keep, _part(ZIP), self.score)
        return _Encoder(self.keep, _grown(self.keep), _part(FIRST), self.score)

    @property
    def _layered(self) -> _Layered:
        if self.counts is not None:
            return _Layered(None, self.layers, self.counts[1:], self.debias)
        return _Layered(self.keep, self.layers, None, self.debias)


@dataclass(frozen=True)
class _Encoder(Method):
    """The selection in the encoder. keep: the budget of the whole; last: what it hands on itself."""

    site = "encoder"
    newlines = "drop"
    prefix_tokens = True
    keep: int | float | None
    last: int | float
    contextual: int | Counts
    score: str

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=-1), "keys": Keys(layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n, prefix = len(tokens), tokens.prefix
        k = count(self.last, n - prefix)
        if k == n - prefix and tokens.mask is None:
            return Reduction.keep(torch.arange(prefix, n, device=tokens.device).expand(len(tokens.features), -1), n)
        score = score_of(signals, "attention", "visiondrop")
        budget = counts(self.last, tokens.real[:, prefix:].sum(1, keepdim=True))
        return _selected(tokens, score, signals, budget, k, self.contextual)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.last, n))


@dataclass(frozen=True)
class _Layered(Method):
    """The selections in the language model, at most one in front of a layer."""

    site = "layer"
    newlines = "drop"
    keep: int | float | None
    layers: tuple[int, ...] | None
    pairs: tuple[Counts, ...] | None
    debias: bool

    def needs(self) -> dict[str, Need]:
        return {"attention": VisualAttention(), "keys": LayerKeys()}

    def steps(self, n: int, depth: int) -> list[Method | None]:
        places = stages("visiondrop", self.layers, STAGES, depth)
        at = {layer: (keep, number) for number, (layer, keep) in enumerate(zip(places, self._counts(n), strict=True))}
        return [self.stage(*at[layer]) if layer in at else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.last, n))

    def stage(self, keep: int, number: int) -> _Stage:
        if self.pairs is not None:
            return _Stage(keep, self.pairs[number][1], self.debias)
        first, last = Fraction(*_part(FIRST)), Fraction(*_part(LAST))
        share = last if number < 0 else first + Fraction(number + 1, self._number) * (last - first)
        return _Stage(keep, (share.numerator, share.denominator), self.debias)

    @property
    def last(self) -> int | float:
        """What the last stage leaves of the tokens that enter the language model."""
        if self.pairs is not None:
            return sum(self.pairs[-1])
        assert self.keep is not None
        return self.keep if isinstance(self.keep, int) else min(1.0, self.keep / _grown(self.keep))

    @property
    def _number(self) -> int:
        return len(STAGES if self.layers is None else self.layers)

    def _counts(self, n: int) -> list[int]:
        """Tokens that each stage leaves of the n that enter the language model."""
        if self.pairs is not None:
            return [min(n, sum(pair)) for pair in self.pairs]
        last, ratio, number = count(self.last, n), sum(FIRST) / sum(LAST), self._number
        return [min(n, round(last * ratio ** ((number - stage) / number))) for stage in range(1, number + 1)]


@dataclass(frozen=True)
class _Stage(Method):
    """One selection. contextual: how many anchors, or their share as (part, of)."""

    site = "layer"
    newlines = "drop"
    keep: int
    contextual: int | Counts
    debias: bool

    def needs(self) -> dict[str, Need]:
        return {"attention": VisualAttention(), "keys": LayerKeys()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        k = count(self.keep, len(tokens))
        if k == len(tokens) and tokens.mask is None:
            return Reduction.identity(len(tokens.features), k, tokens.device)
        score = score_of(signals, "attention", "visiondrop")
        if self.debias:
            after = tokens.real.flip(1).cumsum(1).flip(1)  # queries that stand at a token or behind it
            score = score * tokens.count()[:, None] / after.clamp(min=1)
        budget = quota(signals, self.keep, tokens.count()[:, None])
        return _selected(replace(tokens, place=None), score, signals, budget, k, self.contextual)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


def _selected(
    tokens: Tokens, score: Tensor, signals: Signals | None, budget: Tensor, k: int, contextual: int | Counts
) -> Reduction:
    """Down to `budget` (B, 1) tokens, at most k in a row."""
    keys = read(signals, "keys", "visiondrop", "attention keys (B, N, d)")
    units = 1 if tokens.place is None else tokens.place.units
    seats = contextual if isinstance(contextual, int) else anchors.most_seats(k, *contextual)

    def shared(total: Tensor, budget: Tensor) -> Tensor:
        if not isinstance(contextual, int):
            return anchors.share(total, *contextual)
        return ((2 * total * contextual + budget) // (2 * budget).clamp(min=1)).minimum(total)

    return anchors.dominant_and_contextual(tokens, score, keys, budget, shared, k, min(k, seats + (units if units > 1 else 0)))


def _part(pair: Counts) -> Counts:
    """The contextual share of a published pair, as (part, of)."""
    return pair[1], sum(pair)


def _grown(keep: int | float) -> int | float:
    """What the encoder hands on where the last stage leaves `keep`."""
    ratio = Fraction(sum(FIRST), sum(LAST))
    return round(keep * ratio) if isinstance(keep, int) else min(1.0, keep * float(ratio))


for _part_of_it in (_Encoder, _Layered, _Stage):
    _part_of_it.card = VisionDrop.card
