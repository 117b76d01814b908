"""G-Search and P-Sigmoid: how many visual tokens each layer of the language model needs, found on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from ..calibration import Study
from ..method import Method, Promise, Signals, check_keep, register
from ..needs import LastAttention, Need, TextAttention
from ..ops.budget import count
from ..ops.schedule import falling, fitted, middle_of, whole_counts
from ..ops.search import Point, Range, least
from ..tokens import Reduction, Tokens
from ._common import best, planned, score_of

KAPPA = Range(0.05, 16.0, log=True)  # per layer; at 16 the sigmoid is a step between two layers


@register(
    title="Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
    year=2024,
    source="arXiv:2412.00556",
    family="vlm",
    stage="layer",
    headline="more than 2 times faster without loss of performance",
)
@dataclass(frozen=True)
class GSearch(Method):
    """A number of visual tokens for every language-model layer; those stay that the text attended to most in the layer before.

    Score (N) = attention from the text tokens behind the image in layer l - 1, over all keys, averaged over heads and over these
    queries (`queries` "last": from the prompt's last token alone). Dropped tokens do not come back. The first `first` layers are
    never pruned (in a shallower model all but the last): rankings there differ from all later ones.

    Without calibration the share of the tokens that layer l sees is P-Sigmoid, low + (high - low) / (1 + exp(kappa (l - m))), m
    solved so that `keep` is met. `keep` is the mean over the layers from `first` on, the paper's kind of budget: early ones see
    more, and less than `keep` is left at the end (for pyramiddrop `keep` is what the last stage leaves). Over all n layers
    (first + (n - first) keep) / n of the tokens are seen on average. Where `low` or `high` lie on the wrong side of the budget,
    they give way; each layer keeps at least one token. `schedule` sets the shares of all layers by hand, instead of `keep`.

    `fit` and `jeton.tune` calibrate it. With keep=None, G-Search: layer by layer, the smallest count on a grid of N / `grid`,
    used in that layer and all deeper ones, whose score is at least full - delta |full|, found by bisection; it sets `schedule`.
    That is optimal if scores never fall with more tokens; what contradicts it is noted in the calibration. With a budget,
    P-Sigmoid: `kappa`, `low` and `high` are searched at equal cost. First tried are the fields as they are, the sigmoid nearest
    to `schedule` where one is set, the flat schedule and every single step from all tokens to fewer.

    That rankings are alike in all layers but the first, which is what makes the greedy search good, is checked by
    `jeton.measure.rankings` for a model and data: Spearman's correlation between layers. On the embedded model (150 held-out
    questions) layer 1 and 2 agree by 0.54, and with layer 0 by 0.10 and 0.37; with queries="last" no two agree by more than 0.15.

    No code is published; the text queries, delta, grid, kappa and the range of kappa are our choice. The objective is the
    score of the answers, by default the likelihood of the labels.
    """

    site = "layer"
    average = True
    keep: int | float | None = 0.25
    schedule: tuple[float, ...] | None = None
    kappa: float = 0.5
    low: float = 0.0
    high: float = 1.0
    first: int = 2
    queries: str = "text"
    delta: float = 0.005
    grid: int = 32

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        for name in ("first", "grid"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not self.kappa > 0 or not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"kappa must be above 0 and 0 <= low <= high <= 1, got kappa={self.kappa}, low={self.low}, high={self.high}."
            )
        if not self.delta >= 0:
            raise ValueError(f"delta, the share of the score that may be lost, must be 0 or more, got {self.delta!r}.")
        if self.queries not in ("text", "last"):
            raise ValueError(f'queries must be "text" or "last", got {self.queries!r}.')
        _check_schedule(self.schedule)

    def needs(self) -> dict[str, Need]:
        return _needs(self.queries)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Down to what the last layer sees."""
        if tokens.mask is not None:
            signals = {"quota": planned(self, tokens), **(signals or {})}
        return _Stage(self.promise(len(tokens)).count, self.queries).reduce(tokens, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        shares = self.schedule
        if shares is not None and len(shares) != depth:
            raise ValueError(f"schedule has {len(shares)} shares, but the language model has {depth} layers; fit it to this one.")
        counts, first = self.counts(n, depth), self._first(depth)
        out: list[Method | None] = [None] * depth
        for layer in range(first if shares is None else 1, depth):
            # the same layers whatever n is: counts of other images of a batch may change where those of this one do not
            if shares is None or shares[layer] < shares[layer - 1]:
                out[layer] = _Stage(counts[layer], self.queries)
        return out

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.counts(n, depth)[-1])

    def counts(self, n: int, depth: int) -> list[int]:
        """Tokens of an image of n that each of `depth` layers sees."""
        if self.schedule is not None:
            return [max(1, round(share * n)) for share in self.schedule]
        if self.keep is None:
            raise ValueError(
                "g-search without a budget (keep=None) has no counts yet: fit it to a model and data, or give keep or schedule."
            )
        first = self._first(depth)
        return [n] * first + list(_solved(n, count(self.keep, n), first, depth, self.kappa, self.low, self.high))

    # -- calibration -------------------------------------------------------------------------------------------------------

    def calibrated(self, study: Study) -> Method:
        return self._greedy(study) if self.keep is None else self._sigmoid(study)

    def _greedy(self, study: Study) -> Method:
        bar = study.full - self.delta * abs(study.full)
        taken = [self.grid] * study.depth
        for layer in range(self._first(study.depth), study.depth):

            def passes(k: int, layer: int = layer) -> bool:
                schedule = self._on_grid(taken[:layer] + [k] * (study.depth - layer))
                return study.score(replace(self, schedule=schedule), layer=layer, share=k / self.grid, schedule=schedule) >= bar

            taken[layer:] = [least(passes, 1, taken[layer - 1])] * (study.depth - layer)
        study.notes += _violations(study, self.delta * abs(study.full))
        study.searched = "bisection"
        return replace(self, schedule=self._on_grid(taken))

    def _sigmoid(self, study: Study) -> Method:
        assert self.keep is not None
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / study.tokens)
        space = {"kappa": KAPPA, "low": Range(0.0, share), "high": Range(share, 1.0)}
        start: list[Point] = [{"kappa": self.kappa, "low": self.low, "high": self.high}]
        if self.schedule is not None:
            start.append(dict(zip(space, fitted(self.schedule[self._first(len(self.schedule)) :]), strict=True)))
        start.append({"kappa": 1.0, "low": share, "high": share})
        layers = study.depth - self._first(study.depth)
        for whole in range(1, layers):
            low = (share * layers - whole) / (layers - whole)
            if low > 0:
                start.append({"kappa": KAPPA.high, "low": low, "high": 1.0})
        return study.maximise(lambda point: replace(self, schedule=None, **point), space, start)

    def _on_grid(self, taken: Sequence[int]) -> tuple[float, ...]:
        return tuple(each / self.grid for each in taken)

    def _first(self, depth: int) -> int:
        return max(1, min(self.first, depth - 1))


@dataclass(frozen=True)
class _Stage(Method):
    """What one layer leaves."""

    site = "layer"
    keep: int
    queries: str

    def needs(self) -> dict[str, Need]:
        return _needs(self.queries)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return best(score_of(signals, "attention", "g-search"), tokens, self.keep, signals, most=len(tokens))

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


_Stage.card = GSearch.card


def _needs(queries: str) -> dict[str, Need]:
    return {"attention": TextAttention(raters="all") if queries == "text" else LastAttention()}


@lru_cache(maxsize=4096)
def _solved(n: int, k: int, first: int, depth: int, kappa: float, low: float, high: float) -> tuple[int, ...]:
    """Counts of the layers from `first` on, k of n on average."""
    layers, share = range(first, depth), k / n
    low, high = max(min(low, share), 1 / n), max(high, share)
    if not low < share < high:
        return (k,) * len(layers)
    return tuple(whole_counts(falling(layers, kappa, low, high, middle_of(layers, kappa, low, high, share)), n))


def _check_schedule(schedule: object) -> None:
    if schedule is None:
        return
    if not isinstance(schedule, tuple | list) or not schedule:
        raise ValueError(f"schedule must list a share of the tokens for every layer, got {schedule!r}.")
    for share in schedule:
        check_keep(float(share) if isinstance(share, int) else share, "each of schedule")
    if schedule[0] != 1 or any(b > a for a, b in pairwise(schedule)):
        raise ValueError(f"schedule must begin with 1.0, for layer 0, and never grow, got {schedule!r}.")


def _violations(study: Study, slack: float) -> list[str]:
    """A note on candidates that score lower, by more than `slack`, than one that keeps no more tokens in any layer."""
    whole = (1.0,) * study.depth
    tried = [(whole, study.full), *((trial.point["schedule"], trial.score) for trial in study.trials)]
    wrong = [
        more
        for more, low in tried
        if any(low < high - slack and all(a >= b for a, b in zip(more, less, strict=True)) for less, high in tried)
    ]
    if not wrong:
        return []
    return [
        f"{len(wrong)} of {len(tried)} schedules score lower than one with no more tokens in any layer, by more than the loss "
        "that is allowed: scores do not rise with tokens here, so this schedule may not be the least."
    ]
