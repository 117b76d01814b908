"""VFlowOpt: prune and recycle behind the encoder, prune again by the same map in the language model, optimise the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration import Study
from ..method import AnchorAttention, Carried, Method, Need, PatchEntropy, Promise, Signals, check_keep, register
from ..ops.budget import count, unit_sizes
from ..ops.crops import cropped
from ..ops.grid import squares
from ..ops.recycling import recycle
from ..ops.schedule import last_share
from ..ops.search import Point, Range
from ..tokens import Reduction, Tokens
from ._common import best, check_layers, planned, quota, score_of, stages

STAGES = (Fraction(9, 28), Fraction(18, 28))
FIRST, SECOND = 0.2651026, 0.9833433  # the published optimum at a quarter of the tokens
SPREAD = FIRST / 0.25
SLACK = 0.95  # a search leaves the last stage at least this much less than all of the budget


@register(
    title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    year=2025,
    source="arXiv:2508.05211",
    family="vlm",
    stage="layer",
    headline="about 90 % of performance with 10 % of the tokens, 3.8 times faster",
)
@dataclass(frozen=True)
class VFlowOpt(Method):
    """Prune by one map of importance three times: at the entrance, where losers are recycled, and before two layers.

    Importance (N) = attention received from the picture's anchors in the block that makes the features, averaged over them and
    over heads, + alpha softmax(entropy of each patch's 256 grey values, in bits, over its picture). Anchors are the tokens that
    receive more than `threshold` times the mean (all, where none does). At the entrance, behind the projector, the best survive;
    the others are grouped by squares of `cell` x `cell` tokens (a thumbnail and its stitched crops apart; `cell` need not be
    whole), and each group becomes its mean weighted by importance, in the place of its most important token. In front of layers
    9 and 18 of 28 (in proportion for other depths; `layers`) the least important go; a group has the importance of that token.

    `keep` is what the layers see on average, the paper's budget: less is left at the end (for pyramiddrop `keep` is what the last
    stage leaves). `ratios` are the shares (rho_v, rho_1) that the entrance and the first stage leave of what reaches them; the
    last one follows, rho_2 = min(1, (28 T - 9 rho_v - 9 rho_v rho_1) / (10 rho_v rho_1)) for 28 layers and keep=T. Three ratios
    set all by hand, instead of `keep`. By default they, `threshold` and `cell` are those of the published optimum at 25 %;
    `calibration` "50%", "25%" and "10%" are the published optima for LLaVA-OneVision-7B (alpha is 0 in all).

    `fit` and `jeton.tune` search ratios, threshold in [0, 50], cell in [3, 24] and alpha in [-1, 1] at equal cost, by default for
    the cosine of the last token's state behind the last layer, with and without reduction: 327 candidates, 27 at random.

    Differences from the release: rho_v is met exactly, groups counted (there as many tokens more as there are squares in the
    image are gathered, which meets it nearly); rho_1 is searched only where rho_2 can meet the budget; entropy is that of pixels
    brought back to 0..255 (`pixel_mean`, `pixel_std`: by default those of the model family), not of normalised ones that wrap
    around; several images are recycled too. A class token can be an anchor, where the encoder has one.
    """

    site = "layer"
    average = True
    objective = "cosine"
    calls = 327
    warmup = 27
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "50%": {"keep": 0.5, "ratios": (0.7233201, 0.7487476, 0.487), "threshold": 28.7, "cell": 11.8},
        "25%": {"keep": 0.25, "ratios": (FIRST, SECOND, 0.8773258), "threshold": 34.75955, "cell": 15.5808},
        "10%": {"keep": 0.1, "ratios": (0.1166153, 1.0, 0.6011), "threshold": 39.26493, "cell": 17.38698},
    }
    keep: int | float = 0.25
    ratios: tuple[float, ...] | None = None
    threshold: float = 34.75955
    cell: float = 15.5808
    alpha: float = 0.0
    layers: tuple[int, ...] | None = None
    block: int = -1
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layers(self.layers, len(STAGES))
        if self.ratios is not None:
            if not isinstance(self.ratios, tuple | list) or len(self.ratios) not in (2, 3):
                raise ValueError(f"ratios lists two shares, for the entrance and the first stage, or three, got {self.ratios!r}.")
            for ratio in self.ratios:
                check_keep(float(ratio), "each of ratios")
        if not self.threshold >= 0:
            raise ValueError(f"threshold, a factor of the mean attention, must be 0 or more, got {self.threshold!r}.")
        if not self.cell >= 1:
            raise ValueError(f"cell, the side of a square in tokens, must be at least 1, got {self.cell!r}.")
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha, the weight of entropy, must be a finite number, got {self.alpha!r}.")

    def needs(self) -> dict[str, Need]:
        attention = AnchorAttention(layer=self.block, threshold=self.threshold)
        if not self.alpha:
            return {"attention": attention}
        return {"attention": attention, "entropy": PatchEntropy(self.pixel_mean, self.pixel_std)}

    def parts(self) -> tuple[Method, ...]:
        return _Entrance(self, self.entering), _Layers(self)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """At once down to what the last stage leaves."""
        if tokens.mask is None:
            return _Entrance(self, self.promise(len(tokens)).count).reduce(tokens, signals)
        return _Entrance(self, len(tokens)).reduce(tokens, {"quota": planned(self, tokens), **(signals or {})})

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return _Layers(self).steps(count(self.entering, n), depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.later(count(self.entering, n), depth)[-1])

    @property
    def entering(self) -> int | float:
        """What the entrance leaves of an image."""
        if self.ratios is not None:
            return float(self.ratios[0])
        return round(SPREAD * self.keep) if isinstance(self.keep, int) else min(1.0, SPREAD * self.keep)

    def later(self, n: int, depth: int) -> tuple[int, int]:
        """Tokens that the two stages leave of the n of an image that come through the entrance."""
        if self.ratios is not None and len(self.ratios) == 3:
            middle = _of(n, self.ratios[1])
            return middle, _of(middle, self.ratios[2])
        share = float(self.keep) / float(self.entering)
        budget = self.keep if isinstance(self.keep, int) else n * share
        if n <= budget:
            return n, n
        middle = _of(n, SECOND if self.ratios is None else self.ratios[1])
        one, two = self._places(depth)
        rest = depth * budget - one * n - (two - one) * middle
        return middle, min(middle, max(1, round(rest / (depth - two))))

    def _places(self, depth: int) -> list[int]:
        return stages("vflowopt", self.layers, STAGES, depth)

    def check(self, depth: int) -> None:
        """Refuse ratios that leave nothing of the budget to the last stage."""
        if self.ratios is None or len(self.ratios) == 3 or isinstance(self.keep, int):
            return
        if last_share(self.keep, self.ratios, self._places(depth), depth) <= 0:
            raise ValueError(
                f"ratios={self.ratios!r} alone spend more than keep={self.keep} over {depth} layers; lower them or raise keep."
            )

    # -- calibration -------------------------------------------------------------------------------------------------------

    def calibrated(self, study: Study) -> Method:
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / study.tokens)
        depth, (one, two) = study.depth, self._places(study.depth)
        space = {
            "threshold": Range(0.0, 50.0),
            "cell": Range(3.0, 24.0),
            "alpha": Range(-1.0, 1.0),
            "first": Range(share, max(share, min(1.0, SLACK * depth * share / one))),
            "second": Range(0.0, 1.0),  # how far from the least to the most that meets the budget
        }

        def ends(first: float) -> tuple[float, float]:
            left = max(0.0, depth * share / first - one)
            most = min(1.0, SLACK * left / (two - one)) if two > one else 1.0
            return min(most, left / (depth - one)), most

        def make(point: Point) -> VFlowOpt:
            low, high = ends(point["first"])
            ratios = (point["first"], low + point["second"] * (high - low))
            return replace(self, ratios=ratios, **{name: point[name] for name in ("threshold", "cell", "alpha")})

        first, second = (min(1.0, SPREAD * share), SECOND) if self.ratios is None else self.ratios[:2]
        low, high = ends(first)
        start = {"threshold": self.threshold, "cell": self.cell, "alpha": self.alpha, "first": first}
        return study.maximise(make, space, [{**start, "second": (second - low) / max(high - low, 1e-9)}])


@dataclass(frozen=True)
class _Entrance(Method):
    """The selection at the language model's entrance; `last` is what it leaves."""

    site = "entry"
    whole: VFlowOpt
    last: int | float

    @property
    def keep(self) -> int | float:
        return self.whole.keep

    def needs(self) -> dict[str, Need]:
        return self.whole.needs()

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        importance = self._importance(tokens, signals)
        n, k = len(tokens), count(self.last, len(tokens))
        if k == n and tokens.mask is None:
            return replace(Reduction.identity(len(importance), n, tokens.device), score=importance)
        budget = quota(signals, self.last, tokens.count()[:, None])
        left = recycle(importance, self._squares(tokens), budget, k, tokens.mask)
        return replace(left, score=importance.gather(1, left.index))

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.last, n))

    def _importance(self, tokens: Tokens, signals: Signals | None) -> Tensor:
        """(B, N); tokens that show no part of a picture, where they compete, have 1."""
        importance = score_of(signals, "attention", "vflowopt")
        place = tokens.place
        if self.whole.alpha:
            importance = importance + self.whole.alpha * _softmax(score_of(signals, "entropy", "vflowopt"), tokens)
        return importance if place is None else importance.masked_fill(place.structure, 1.0)

    def _squares(self, tokens: Tokens) -> Tensor:
        if tokens.place is None:
            raise ValueError("vflowopt recycles tokens by their place in the picture: give Tokens a place.")
        sizes = unit_sizes(tokens.place.unit, tokens.place.units, tokens.mask)
        return squares(tokens.place, self.whole.cell, cropped(tokens.place, sizes), tokens.mask)


@dataclass(frozen=True)
class _Layers(Method):
    """The two selections in the language model."""

    site = "layer"
    whole: VFlowOpt

    @property
    def keep(self) -> int | float:
        return self.whole.keep

    def needs(self) -> dict[str, Need]:
        return {"importance": Carried(of="vflowopt")}

    def steps(self, n: int, depth: int) -> list[Method | None]:
        self.whole.check(depth)
        at = dict(zip(self.whole._places(depth), self.whole.later(n, depth), strict=True))
        return [_Stage(at[layer]) if layer in at else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.whole.later(n, depth)[-1])


@dataclass(frozen=True)
class _Stage(Method):
    """One selection in front of a layer, by the importance carried there."""

    site = "layer"
    keep: int

    def needs(self) -> dict[str, Need]:
        return {"importance": Carried(of="vflowopt")}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return best(score_of(signals, "importance", "vflowopt"), tokens, self.keep, signals, most=len(tokens))

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


def _softmax(x: Tensor, tokens: Tokens) -> Tensor:
    """Softmax of x (B, N) over the tokens of each picture."""
    unit = torch.zeros_like(tokens.origin) if tokens.place is None else tokens.place.unit.clamp(min=0)
    units = 1 if tokens.place is None else tokens.place.units
    shown = tokens.real if tokens.place is None else tokens.real & ~tokens.place.structure
    x = (x - x.masked_fill(~shown, -torch.inf).amax(1, keepdim=True)).exp().masked_fill(~shown, 0)
    return x / x.new_zeros(len(x), units).scatter_add(1, unit, x).gather(1, unit).clamp(min=1e-12)


def _of(n: int, ratio: float) -> int:
    """What is left of n tokens when round(n (1 - ratio)) go, at least one."""
    return max(1, n - round(n * (1 - ratio)))


for _part_of_it in (_Entrance, _Layers, _Stage):
    _part_of_it.card = VFlowOpt.card
