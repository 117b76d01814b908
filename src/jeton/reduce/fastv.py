"""FastV: an image is worth half its tokens after layer two."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Budget, LastAttention, Method, Need, Promise, Signals, check_keep, register
from ..ops.selection import top_k
from ..tokens import Reduction, Tokens
from ._common import score_of


@register(
    title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
    year=2024,
    source="arXiv:2403.06764",
    family="vlm",
    stage="layer",
    headline="45 % fewer FLOPs on LLaVA-1.5 at equal accuracy",
)
@dataclass(frozen=True)
class FastV(Method):
    """Before language-model layer `layer`, keep the visual tokens the prompt's last token attended to in the layer before.

    score (B, N) = mean over heads of attention (B, H, N) of the last token over the visual tokens at layer `layer` - 1; the K
    highest stay, in order, with their original positions. The paper's K = 2, R = 50 % is layer=2, keep=0.5.
    """

    site = "layer"
    layer: int = 2
    keep: int | float = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise TypeError(f"layer must be an int, got {self.layer!r}.")
        if self.layer < 1:
            raise ValueError(f"layer={self.layer} has no layer before it whose attention could be read; use layer=1 or later.")

    def needs(self) -> dict[str, Need]:
        return {"attention": LastAttention()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return top_k(score_of(signals, "attention", "fastv"), self.keep, tokens.mask)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        if self.layer >= depth:
            raise ValueError(
                f"fastv(layer={self.layer}) needs more than {self.layer} layers, but there are {depth}; layers 1 to "
                f"{depth - 1} are possible."
            )
        return [self if layer == self.layer else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n))
