"""TinyChart: ToMe in every block of a SigLIP tower, so that charts can be read at high resolution."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import check_keep, register
from ._common import Merging


@register(
    title="TinyChart: Efficient Chart Understanding with Visual Token Merging and Program-of-Thoughts Learning",
    year=2024,
    source="arXiv:2404.16635",
    family="vit",
    stage="block",
    headline="a 3B model above 13B chart models and GPT-4V on ChartQA, at 768 pixels with 84 merges in every block",
)
@dataclass(frozen=True)
class TinyChart(Merging):
    """In every block, between attention and MLP, ToMe's matching by attention keys merges r tokens into size-weighted means.

    Pictures of 768 pixels make 54 x 54 = 2916 patches of a SigLIP tower and end as 2916 - 84 L tokens: 732 behind the 26 blocks
    in front of the last hidden state but one, 648 behind all 27. A token of size s counts s times as a key (`proportional`).
    SigLIP has no class token, so nothing is protected; the published listing, in which the language model finds the tokens, is
    that of the merging, here they stand in the order of their representatives.

    `keep` merges evenly over all blocks until exactly that many patches are left. The published model trains its tower, the
    position table included, with merging on: apply the method while training, and give the model a table of 54 x 54 positions
    (`interpolate_pos_encoding`). The other half of the system, programs as answers, is in `jeton.measure.programs` and
    `jeton.measure.charts`.
    """

    r: int = 84
    keep: int | float | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0:
            raise ValueError(f"r must be a whole number of tokens that every block merges, got {self.r!r}.")

    def removed(self, n: int, depth: int) -> list[int]:
        return [self.r] * depth
