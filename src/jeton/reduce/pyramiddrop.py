"""PyramidDrop: fewer visual tokens the deeper the language model gets, a stage at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ..method import Budget, LastAttention, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import count, geometrically
from ..tokens import Reduction, Tokens
from ._common import best, check_layers, score_of, stages

STAGES = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))


@register(
    title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    year=2024,
    source="arXiv:2410.17247",
    family="vlm",
    stage="layer",
    headline="40 % less training time and 55 % fewer inference FLOPs at comparable performance",
)
@dataclass(frozen=True)
class PyramidDrop(Method):
    """At the end of each stage of the language model keep the visual tokens that the prompt's last token is about to attend to.

    In front of a stage's layer: score (N) = mean over heads of the last token's attention in that layer, over all keys, computed
    ahead from the layer's own norm and q and k projections; the best stay, in order.

    `keep` is what the last stage leaves; the stages on the way keep equal shares of each other, n (keep / n)^(s / S), so that
    0.125 is the paper's 0.5, 0.25, 0.125 of the original tokens (`ratios` sets these by hand, instead of `keep`). `layers` are
    those in front of which tokens go; None puts them at 1/4, 1/2 and 3/4 of the depth, the paper's 8, 16, 24 of 32: 576, 288,
    144, 72 tokens in 8 layers each, 270 on average. A published budget that is an average is thus larger than `keep`.

    The release renumbers positions: that is positions="compact" of `apply`.
    """

    site = "layer"
    keep: int | float = 0.125
    ratios: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for ratio in self.ratios or ():
            check_keep(float(ratio), "each of ratios")
        if self.ratios is not None and (not self.ratios or list(self.ratios) != sorted(self.ratios, reverse=True)):
            raise ValueError(f"ratios must list shares of the original tokens that never grow, got {self.ratios!r}.")
        check_layers(self.layers, len(self.ratios) if self.ratios is not None else None)
        if self.layers is None and self.ratios is not None and len(self.ratios) != len(STAGES):
            raise ValueError(f"ratios={self.ratios!r} names {len(self.ratios)} stages; say with layers where they stand.")
        if self.layers == ():
            raise ValueError("layers=() leaves nothing to do; name at least one layer, or None for the paper's.")

    def needs(self) -> dict[str, Need]:
        return {"attention": LastAttention(ahead=True)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return best(score_of(signals, "attention", "pyramiddrop"), tokens, self._last, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        at = dict(zip(stages("pyramiddrop", self.layers, STAGES, depth), self._counts(n), strict=True))
        return [replace(self, keep=at[layer], ratios=None) if layer in at else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self._last).count(n))

    @property
    def _last(self) -> int | float:
        return self.keep if self.ratios is None else float(self.ratios[-1])

    def _counts(self, n: int) -> list[int]:
        """Tokens that each stage leaves of n."""
        if self.ratios is not None:
            return [count(float(ratio), n) for ratio in self.ratios]
        return geometrically(n, count(self.keep, n), len(STAGES if self.layers is None else self.layers), halving=False)
