"""FasterVLM: keep what the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Budget, Method, Need, Promise, Signals, check_keep, register
from ..ops.selection import top_k
from ..tokens import Reduction, Tokens
from ._common import attention, check_per, check_score, score_of


@register(
    title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    year=2024,
    source="arXiv:2412.01818",
    family="vlm",
    stage="encoder",
    headline="about 90 % of the score of LLaVA-1.5-7B with 5 % of its visual tokens",
)
@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the K patches with most attention from the encoder's class token, at the block whose output the model uses.

    score (B, N) = mean over heads of attention (B, H, N) of the class token over the patches; the K highest stay, in their
    spatial order. `per` "crop" gives every crop and the thumbnail its own K, as the released code does; "image" splits one K
    between them by their sizes. `score` "received" takes the attention each patch receives instead, for encoders without a
    class token.
    """

    site = "encoder"
    keep: int | float = 0.25
    per: str = "image"
    score: str = "class"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_per(self.per)
        check_score(self.score)

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=-1)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score = score_of(signals, "attention", "fastervlm")
        return top_k(score, self.keep, tokens.mask, tokens.place, self.per)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep, self.per).count(n))
