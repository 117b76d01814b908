"""MustDrop: similar windows merge in the encoder, tokens no word looks at leave the language model, and the cache follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from ..method import (
    Entered,
    Method,
    Need,
    Promise,
    Signals,
    TextAttention,
    check_keep,
    register,
)
from ..ops.budget import count
from ..ops.merging import merge
from ..ops.selection import best_of_units, pack
from ..ops.windows import alike, into_windows, most_alike, windows
from ..tokens import Reduction, Tokens
from ._common import attention, check_layers, check_score, quota, score_of, stages

LAYERS = (Fraction(2, 32), Fraction(6, 32), Fraction(10, 32), Fraction(14, 32))
SIDE = 3  # of a window
THRESHOLDS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.010)}


@register(
    title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    year=2024,
    source="arXiv:2411.10803",
    family="vlm",
    stage="layer",
    headline="88.5 % fewer FLOPs at 92.2 % compression with comparable accuracy",
)
@dataclass(frozen=True)
class MustDrop(Method):
    """Merge similar windows in the encoder, drop what all text ignores in the language model, and forget it in the cache too.

    1. After encoder block 0 the grid is cut into 3 x 3 windows; one whose 72 cosines between different tokens average at least
    `similarity` becomes its mean (None: no merging). 2. After some language-model layers, with A (T, V) the attention of the text
    behind the image to its V visual tokens, averaged over heads: token j leaves if sum_t A_tj < `total` * sum_tj A and max_t A_tj
    < `single` and j is not in the key set, the ceil(`key` * V') tokens with the class token's highest attention (`score`
    "received": that each patch receives) among the V' that entered the language model. 3. With `shrink`, once the prompt has run,
    the caches from the first of these layers on hold only what is left after the last; decoding sees no other visual tokens
    there.

    Counts follow from the picture. The paper's thresholds (total, single) for LLaVA-1.5 are (0.001, 0.001) for about 192 tokens,
    (0.0012, 0.001) for 128 and (0.011, 0.01) for 64: `preset` sets them. With `keep` counts are exact instead: each of the five
    steps keeps an equal share of what reached it; the most similar windows merge as long as that leaves enough, and then the
    tokens with the largest max(sum share / total, max / single), which is 1 at the thresholds, stay behind the key set.
    Any-resolution crops may hold fewer of the picture's own tokens than `keep` after merging; then all of them stay. `layers` are
    those whose attention is read, and tokens go behind them; None means the paper's 2, 6, 10, 14 of 32, scaled to the depth.

    Rows and columns beyond the last whole window are not merged. Differences from the release: each picture merges its own
    windows, not as few as the batch's fewest; a merged token stands in the middle of its window instead of in front of all
    others; the key set is read in the block whose output is handed on, not in the one behind it; several images are judged one by
    one, each by the text behind it, not as one span. The release renumbers positions, per layer where caches differ in length:
    that is positions="compact" of `apply`.
    """

    site = "layer"
    keep: int | float | None = None
    preset: int | None = None
    total: float | None = None
    single: float | None = None
    layers: tuple[int, ...] | None = None
    similarity: float | None = 0.8
    key: float = 0.08
    shrink: bool = True
    score: str = "class"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.preset is not None and self.preset not in THRESHOLDS:
            raise ValueError(f"preset must be one of {', '.join(map(str, THRESHOLDS))}, got {self.preset!r}.")
        if self.preset is not None and (self.keep is not None or self.total is not None or self.single is not None):
            raise ValueError("preset names both thresholds; leave out keep, total and single, or the preset.")
        for name in ("total", "single"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value!r} must be a share of attention of at least 0.")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity!r} is a cosine, from -1 to 1; None merges nothing.")
        if not 0 <= self.key <= 1:
            raise ValueError(f"key={self.key!r} must be a fraction from 0 to 1.")
        check_score(self.score)
        check_layers(self.layers)
        if self.layers == ():
            raise ValueError("layers=() leaves nothing to do; name at least one layer, or None for the paper's.")

    def needs(self) -> dict[str, Need]:
        return self._layered.needs()

    def parts(self) -> tuple[Method, ...]:
        return (self._layered,) if self.similarity is None else (self._windows, self._layered)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """What the last stage between two layers does."""
        return self._layered.reduce(tokens, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._layered.steps(n, depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return self._layered.promise(n, depth)

    def shrinks(self, depth: int) -> int | None:
        return self._layered.shrinks(depth)

    @property
    def thresholds(self) -> tuple[float, float]:
        total, single = THRESHOLDS[self.preset or 192]
        return total if self.total is None else self.total, single if self.single is None else self.single

    @property
    def _windows(self) -> _Windows:
        return _Windows(self.similarity, self.keep, 1 + self._stages)

    @property
    def _layered(self) -> _Layered:
        return _Layered(
            self.keep, *self.thresholds, self.layers, self.key, self.shrink, self.score, self._stages, self._stages + 1
        )

    @property
    def _stages(self) -> int:
        return len(LAYERS if self.layers is None else self.layers)


@dataclass(frozen=True)
class _Windows(Method):
    """The merging in the encoder. budget: what the whole method keeps in `stages` equal steps, of which this is the first."""

    site = "block"
    point = "after"
    similarity: float | None
    budget: int | float | None
    stages: int

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        if tokens.place is None:
            raise ValueError(
                "mustdrop merges windows of a picture, so its tokens must say where they stand: pass tokens with a place."
            )
        n, prefix = len(tokens), tokens.prefix
        most = self._most(n - prefix)
        if most == 0:
            return Reduction.identity(len(tokens.features), n, tokens.device, prefix)
        number, middle, windowed = windows(tokens.place, SIDE, tokens.mask)
        likeness = alike(tokens.features, number, windowed, SIDE)
        chosen = most_alike(likeness, most, self.similarity if self.budget is None else None)
        into = into_windows(number, middle, chosen)
        into = into if tokens.mask is None else into.masked_fill(~tokens.mask, -1)
        if most is None:  # counts follow from the picture: one host sync for the longest row
            k, ragged = int((into == torch.arange(n, device=into.device)).sum(1).max()), True
        elif tokens.mask is None and tokens.place.shape is not None:
            k, ragged = n - min(most, windowed) * (SIDE**2 - 1), False
        else:
            k, ragged = n, True
        return merge(into, k, tokens.size, prefix=prefix, ragged=ragged)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [self, *[None] * (depth - 1)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False)

    def _most(self, n: int) -> int | None:
        """Windows of a picture of n tokens that may merge."""
        return None if self.budget is None else (n - _left(n, self.budget, 1, self.stages)) // (SIDE**2 - 1)


@dataclass(frozen=True)
class _Layered(Method):
    """The dropping in the language model. `stages` steps are left, of `of` in all."""

    site = "layer"
    of_all = True
    keep: int | float | None
    total: float
    single: float
    layers: tuple[int, ...] | None
    key: float
    shrink: bool
    score: str
    stages: int
    of: int

    def needs(self) -> dict[str, Need]:
        return {
            "attention": TextAttention(raters="all"),
            "peak": TextAttention(raters="all", peak=True),
            "class": attention(self.score, layer=-1),
            "entered": Entered(),
        }

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n = len(tokens)
        if self.keep is not None and count(self.keep, n) == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        mean, peak = (score_of(signals, name, "mustdrop").masked_fill(~tokens.real, 0) for name in ("attention", "peak"))
        share = mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        keys = self._keys(tokens, signals)
        if self.keep is None:
            noticed = (share >= self.total) | (peak >= self.single)
            return pack((noticed | keys) & tokens.real, n, ragged=True)
        tiny = torch.finfo(torch.float32).tiny
        worth = torch.maximum(share / max(self.total, tiny), peak / max(self.single, tiny)).clamp(max=1e30)
        worth = torch.where(keys, worth / (1 + worth) + 2, worth / (1 + worth))  # a key token is worth more than any other
        one = torch.zeros_like(tokens.origin)
        stay = quota(signals, self.keep, tokens.count()[:, None])
        return pack(best_of_units(worth, one, stay, tokens.mask), count(self.keep, n), ragged=tokens.mask is not None)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        places = stages("mustdrop", self.layers, LAYERS, depth, behind=1)
        made = []
        for stage in range(self.stages):
            keep = None if self.keep is None else _left(n, self.keep, self.of - self.stages + stage + 1, self.of)
            made.append(replace(self, keep=keep, layers=(0,), stages=1))
        at = dict(zip(places, made, strict=True))
        return [at.get(layer) for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False) if self.keep is None else Promise(count(self.keep, n))

    def shrinks(self, depth: int) -> int | None:
        first = stages("mustdrop", self.layers, LAYERS, depth, behind=1)[0] - 1
        return max(1, first) if self.shrink else None

    def _keys(self, tokens: Tokens, signals: Signals | None) -> Tensor:
        """(B, N) the key set: it never leaves, so that it is the best of what is left at every stage."""
        rated = score_of(signals, "class", "mustdrop")
        entered = tokens.count()[:, None] if signals is None or "entered" not in signals else signals["entered"]
        wanted = (entered.double() * self.key - 1e-9).ceil().long().clamp(min=0)
        return best_of_units(rated, torch.zeros_like(tokens.origin), wanted, tokens.mask)


def _left(n: int, keep: int | float, step: int, steps: int) -> int:
    """Tokens of n that are left after a step when all steps keep equal shares and the last leaves `keep`."""
    last = count(keep, n)
    return ceil(n * (last / n) ** (step / steps) - 1e-9)


for _part in (_Windows, _Layered):
    _part.card = MustDrop.card  # type: ignore[attr-defined]
