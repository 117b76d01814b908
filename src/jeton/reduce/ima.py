"""IMA: in a frozen language model perceptual tokens change slowly, so that some of their layers can be left out.

The alignment scores and sub-networks of the same paper are in `jeton.measure.alignment` and `jeton.measure.subnet`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..method import WHO, Method, Promise, Rule, Signals, Skip, register
from ..tokens import Reduction, Tokens

PARTS = ("block", "ffn", "attention", "parallel")


@register(
    title="Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs",
    year=2024,
    source="arXiv:2405.16700",
    family="vlm",
    stage="rule",
    headline="skipping blocks or MLPs for perceptual tokens saves much compute; one sub-network serves many tasks",
)
@dataclass(frozen=True)
class IMA(Method):
    """Every `interval`-th layer runs only in part for some tokens; no token leaves.

    Layers l with `start` < l < `end` and l mod `interval` = 0 are altered; `end` None means the last layer, so that it stays
    whole. `skip`: "block" (x as it is), "ffn" (x + attention), "attention" (x + ffn), or "parallel": x + attention(n(x)) +
    ffn(n(x)) with the layer's first norm for both. `scope`: "decode" (single tokens that continue a cache), "context" (prompt and
    decoded tokens), "only_context" (the prompt), or "visual" (the prompt's visual tokens, wherever they stand).

    Tokens that skip a layer leave their keys and values in its cache all the same, computed by the layer itself from the token in
    front of it (the release keeps those of the layer before): all layers hold the same columns, tokens that do not skip see what
    they always see, and a conversation may go on without the method. In "visual" the attention runs for all tokens of the prompt,
    the MLP only for those that need it. A second question is a prompt again; its words are "decode" only one at a time.
    """

    site = "rule"
    skip: str = "ffn"
    scope: str = "decode"
    interval: int = 1
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.skip not in PARTS:
            raise ValueError(f"skip must be one of {', '.join(PARTS)}, got {self.skip!r}.")
        if self.scope not in WHO:
            raise ValueError(f"scope must be one of {', '.join(WHO)}, got {self.scope!r}.")
        for name in ("interval", "start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | (type(None) if name == "end" else int)):
                raise TypeError(f"{name} must be a whole number, got {value!r}.")
        if self.interval < 1:
            raise ValueError(
                f"interval={self.interval} must be at least 1: every layer; a number above the depth changes nothing."
            )
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"no layer lies between start={self.start} and end={self.end}; both are left whole.")

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Nothing leaves."""
        return Reduction.identity(len(tokens.features), len(tokens), tokens.device, tokens.prefix)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)

    def rules(self, depth: int) -> dict[int, Rule]:
        end = depth - 1 if self.end is None else min(self.end, depth)
        return {layer: Skip(self.skip, self.scope) for layer in range(self.start + 1, end) if layer % self.interval == 0}
