"""AIM: merge similar tokens before the language model, then let PageRank on its attention take the rest layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..method import Method, Need, PageRank, Promise, Signals, check_keep, register
from ..ops.budget import allocate, count, counts, unit_sizes
from ..ops.matching import by_parity_in_units, halvings
from ..ops.merging import merge
from ..tokens import Reduction, Tokens
from ._common import best, score_of

FALLS = 8  # layers over which tokens go, an eighth at a time
DEPTH = 28  # of the model for which the schedule was published


@register(
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    year=2024,
    source="arXiv:2412.03248",
    family="vlm",
    stage="layer",
    headline="about 7 times fewer FLOPs at equal accuracy on video",
)
@dataclass(frozen=True)
class AIM(Method):
    """Merge each picture's tokens in rounds of bipartite matching, then drop visual tokens over the second half of the layers.

    Merging, of each picture, crop or frame by itself: tokens at even places send, those at odd places receive; cosine of the
    features; the r senders most similar to their best receiver join it, and the group becomes its plain mean (no sizes).
    r is N // 2, then N // 4, ... of the N tokens at first, `rounds` of them: 196 -> 98 -> 49. `before` "model" merges what the
    language model is about to see, "projector" what the encoder made (the authors' setting for LLaVA-1.5, with rounds=3).

    Pruning: behind layer `start` + i - 1 the floor(N (1 - i / 8)) visual tokens of an image (all crops or frames together) with
    highest PageRank stay, i = 1..8, and none at the end: text alone passes the last layers. PageRank: p = 1 / L on all L tokens,
    `iterations` times p <- p M, M = softmax(logits / `tau`) of that layer; importance sqrt(mean over heads of p²). start None is
    half of the depth, 14 of 28 as published for Qwen2-7B (13 of 32 for Vicuna-7B), and in models of fewer layers tokens fall
    over proportionally fewer. `query_block` queries are scored at a time; no L x L map is kept.

    `keep` None is this schedule. A `keep` is what is left of an image at the end: tokens fall in equal steps down to it, and
    merging leaves no less than sqrt(N keep). A fraction rounds twice and may end one token beside it. `ratios` instead lists the
    shares left behind layers start, start + 1, ...; 0 is allowed.

    With `restore_order` a merged token stands where the first of its group stood, and the next round goes by that. Without, it
    stands where its receiver did, and the next round goes by the published listing: unmerged senders, most similar first, then
    receivers. In the prompt tokens always stand in the order of their picture. The release only masks dropped tokens, which
    still pass mass on as queries; here they are gone.
    """

    site = "layer"
    keep: int | float | None = None
    rounds: int = 2
    before: str = "model"
    restore_order: bool = True
    start: int | None = None
    ratios: tuple[float, ...] | None = None
    tau: float = 0.1
    iterations: int = 5
    query_block: int = 128

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.before not in ("model", "projector"):
            raise ValueError(f'before must be "model" or "projector", got {self.before!r}.')
        for name, least in (("rounds", 0), ("start", 0), ("iterations", 0), ("query_block", 1)):
            value = getattr(self, name)
            if (value is not None or name != "start") and (
                isinstance(value, bool) or not isinstance(value, int) or value < least
            ):
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau!r} must be above 0; attention as it is has tau=1.0.")
        if self.ratios is None:
            return
        if self.keep is not None:
            raise ValueError("keep and ratios both say what is left at the end; give one of them.")
        if not self.ratios or any(not 0 <= each <= 1 for each in self.ratios) or any(b > a for a, b in pairwise(self.ratios)):
            raise ValueError(f"ratios must list shares from 0 to 1 that never grow, got {self.ratios!r}.")

    def needs(self) -> dict[str, Need]:
        return self._layered.needs()

    def parts(self) -> tuple[Method, ...]:
        merging = _Merging if self.before == "model" else _MergingEarly
        return (merging(self.keep, self.rounds, self.restore_order), self._layered)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """One pruning, down to what is left at the end."""
        planned = tokens.count()[:, None]
        for part in self.parts():
            planned = part.planned(planned)  # type: ignore[attr-defined]
        step = _Stage(self.promise(len(tokens)).count, self._layered.need)
        return step.reduce(tokens, {**(signals or {}), "quota": planned})

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._layered.steps(self.parts()[0].promise(n).count, depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        for part in self.parts():
            n = part.promise(n, depth).count
        return Promise(n)

    @property
    def _layered(self) -> _Layered:
        last: int | float = 0 if self.keep is None else self.keep
        if isinstance(self.keep, float):
            last = min(1.0, self.keep / _share(self.keep, self.rounds))
        need = PageRank(None, self.tau, self.iterations, self.query_block)
        return _Layered(self.keep, last, self.start, self.ratios, need)


@dataclass(frozen=True)
class _Merging(Method):
    """The rounds of merging. keep: the budget of the whole."""

    site = "entry"
    keep: int | float | None
    rounds: int
    restore_order: bool

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        result = Reduction.identity(b, n, tokens.device)
        own, units = (torch.zeros_like(tokens.origin), 1) if tokens.place is None else (tokens.place.unit, tokens.place.units)
        own, ragged = own.clamp(min=0), units > 1 or tokens.mask is not None
        if not ragged and self.promise(n).count == n:
            return result
        plan = self._plan(unit_sizes(own, units, tokens.mask), len(halvings(n, self.promise(n).count)) + ragged)
        widths = self._widths(n, units, len(plan), ragged)
        tokens = replace(tokens, place=None)
        for left, width in zip(plan, widths, strict=True):
            unit = own.gather(1, result.index)
            merges = unit_sizes(unit, units, tokens.mask) - left
            into, key = by_parity_in_units(tokens.features, unit, merges, tokens.order, tokens.mask)
            into = _to_the_first(into) if self.restore_order else into
            step = merge(into, width, ragged=ragged)
            if not self.restore_order:
                listed = key.gather(1, step.index).masked_fill(~step.real, 2 * n)
                step = replace(step, order=listed.argsort(dim=1, stable=True).argsort(dim=1))
            tokens, result = replace(step.apply(tokens), size=None), result.then(step)
        return result

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.planned(n))

    def planned(self, n: Any) -> Any:
        """Tokens left of n, an int or a tensor of sizes (then in one picture)."""
        if isinstance(self.keep, float):
            share = _share(self.keep, self.rounds)
            return counts(share, n) if isinstance(n, Tensor) else count(share, n)
        least = _halved(n, self.rounds)
        if self.keep is None:
            return least
        if isinstance(n, Tensor):
            return torch.maximum(least, (n * n.clamp(max=self.keep)).double().sqrt().round().long())
        return max(least, round(math.sqrt(n * min(n, self.keep))))

    def _plan(self, sizes: Tensor, most: int) -> list[Tensor]:
        """(B, U) tokens left of each unit after every round; `most` rounds reach any budget."""
        if self.keep is None:
            return [_halved(sizes, done + 1) for done in range(self.rounds)]
        one = (sizes > 0).long()  # no picture may vanish
        goal = one + allocate(sizes - one, (self.planned(sizes.sum(1)) - one.sum(1)).clamp(min=0), sizes - one)
        return [torch.maximum(goal, (sizes + 2**done - 1) // 2**done) for done in range(1, most + 1)]

    def _widths(self, n: int, units: int, rounds: int, ragged: bool) -> list[int]:
        """Room for what is left of a row after every round; exact where rows are alike."""
        if not ragged and self.keep is None:
            return [_halved(n, done + 1) for done in range(rounds)]
        if not ragged:
            return [max(self.promise(n).count, (n + 2**done - 1) // 2**done) for done in range(1, rounds + 1)]
        odd = self.rounds * units  # what rounding may leave more than half, in every round and unit
        last = (n >> self.rounds) + 1 if self.keep is None else max(self.promise(n).count, units)
        return [n] * (rounds - 1) + [min(n, last + odd)]


@dataclass(frozen=True)
class _MergingEarly(_Merging):
    """The same in front of the projector."""

    site = "encoder"


@dataclass(frozen=True)
class _Layered(Method):
    """The prunings in the language model. keep: the budget of the whole; last: what is left of the tokens that enter."""

    site = "layer"
    keep: int | float | None
    last: int | float
    start: int | None
    ratios: tuple[float, ...] | None
    need: PageRank

    def needs(self) -> dict[str, Need]:
        return {"attention": self.need}

    def steps(self, n: int, depth: int) -> list[Method | None]:
        plan = self._counts(n, depth)
        begin = max(0, min(depth // 2, depth - 1 - len(plan))) if self.start is None else self.start
        if begin + len(plan) >= depth:
            raise ValueError(
                f"aim prunes behind layers {begin} to {begin + len(plan) - 1}, but of {depth} layers only 0 to {depth - 2} have "
                f"one behind them; use a smaller start, or fewer ratios."
            )
        at = dict(enumerate(plan, begin + 1))
        return [_Stage(at[layer], self.need) if layer in at else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.planned(n))

    def planned(self, n: Any) -> Any:
        """Tokens left at the end of n that enter, an int or a tensor."""
        last = self.last if self.ratios is None else Fraction(self.ratios[-1])
        if isinstance(last, Fraction):
            return n * last.numerator // last.denominator
        return counts(last, n) if isinstance(n, Tensor) else count(last, n)

    def _counts(self, n: int, depth: int) -> list[int]:
        """Tokens left behind each layer of the schedule."""
        if self.ratios is not None:
            return [math.floor(n * Fraction(ratio)) for ratio in self.ratios]
        falls = min(FALLS, max(1, round(Fraction(depth * FALLS, DEPTH))))
        lost = n - self.planned(n)
        return [(n * falls - lost * done) // falls for done in range(1, falls + 1)]


@dataclass(frozen=True)
class _Stage(Method):
    """One pruning."""

    site = "layer"
    keep: int
    need: PageRank

    def needs(self) -> dict[str, Need]:
        return {"attention": self.need}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return best(score_of(signals, "attention", "aim"), tokens, self.keep, signals)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


def _halved(n: Any, rounds: int) -> Any:
    """What is left of n after rounds that merge n // 2, n // 4, ... tokens."""
    return n - sum(n // 2**done for done in range(1, rounds + 1))


def _share(keep: float, rounds: int) -> float:
    """The share of tokens that merging leaves where `keep` of them are left at the end."""
    return max(2.0**-rounds, math.sqrt(keep))


def _to_the_first(into: Tensor) -> Tensor:
    """The same groups, each standing where its first token stood; into (B, N), -1 for padding."""
    here = torch.arange(into.shape[1], device=into.device).expand_as(into)
    none = into < 0
    first = here.scatter_reduce(1, into.clamp(min=0), here.masked_fill(none, into.shape[1]), "amin")
    return first.gather(1, into.clamp(min=0)).masked_fill(none, -1)


for _part in (_Merging, _MergingEarly, _Layered, _Stage):
    _part.card = AIM.card
