"""ToMe: merge the most similar tokens, a few in every block."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..method import check_keep, register
from ._common import Merging


@register(
    title="Token Merging: Your ViT But Faster",
    year=2022,
    source="arXiv:2210.09461",
    family="vit",
    stage="block",
    headline="2 times the throughput of ViT-L at 512 for 0.2 to 0.3 points of accuracy",
)
@dataclass(frozen=True)
class ToMe(Merging):
    """In every block, between attention and MLP, merge r tokens into their most similar partner.

    Tokens at even places of the sequence send, those at odd places receive. S = cos of the attention keys, averaged over heads
    (B, N, d); each sender goes to its best receiver, and the r best pairs merge into their size-weighted mean
    x' = sum(s x) / sum(s). The sequence goes on as [unmerged even, odd]. Class, distillation and register tokens never move or
    receive. With `proportional`, a token of size s counts s times as a key in attention (log s added to its logits).

    `r` is the number per block; ``(r, inflect)`` goes linearly from ``2r - int(r (1 - inflect))`` down or up to the same
    distance from r (inflect -1: decreasing); a list gives each block its own, zeros after its end. `keep` instead merges evenly
    over all blocks until exactly that many patches are left. Called alone, reduce() is one merging of `r`, or as many as `keep`
    takes; without keys as a signal it compares the features.
    """

    r: int | tuple[int, float] | list[int] = field(default=8, hash=False)
    keep: int | float | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if isinstance(self.r, tuple) and len(self.r) != 2:
            raise ValueError(f"r={self.r!r}: a tuple is (r, inflect), e.g. (13, -1.0); write a number per block as a list.")
        whole = self.r[:1] if isinstance(self.r, tuple) else self.r if isinstance(self.r, list) else [self.r]
        for r in whole:
            if isinstance(r, bool) or not isinstance(r, int):
                raise TypeError(f"r must be an int, (r, inflect) or a list of ints, got {self.r!r}.")
            if r < 0:
                raise ValueError(f"r={self.r!r} merges a negative number of tokens; write r=0 to merge none.")

    def removed(self, n: int, depth: int) -> list[int]:
        if isinstance(self.r, list):
            return (self.r + [0] * depth)[:depth]
        if isinstance(self.r, int) or depth == 1:
            return [self.r if isinstance(self.r, int) else self.r[0]] * depth
        r, inflect = self.r
        least = int(r * (1.0 - inflect))
        step = (2 * r - 2 * least) / (depth - 1)
        return [int(least + step * block) for block in range(depth)]
