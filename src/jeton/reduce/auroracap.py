"""AuroraCap: ToMe with a share of the patches to keep, the same number merged in every block of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ..method import check_keep, register
from ._common import Merging, check_ratio


@register(
    title="AuroraCap: Efficient, Performant Video Detailed Captioning and a New Benchmark",
    year=2024,
    source="arXiv:2410.03051",
    family="vit",
    stage="block",
    headline="CIDEr 88.9 on Flickr30k (GPT-4V 55.3, Gemini-1.5 Pro 82.2)",
)
@dataclass(frozen=True)
class AuroraCap(Merging):
    """In every block, between attention and MLP, ToMe merges r = floor(n (1 - ratio) / L) of n patches into size-weighted means.

    L is the number of the encoder's blocks. Features are published to come out of the last block but one, so one block's merges
    are missing, and r is rounded down: the share that is left is never quite `ratio`. `promise` and the report say the count: 378
    pixels in patches of 14 and L = 48 give r = 13 at ratio 0.1 and 729 - 13 · 47 = 118 patches, a class token beside them. A
    method sees only the blocks that are used, and `layers` None divides by their number, which comes nearer to `ratio`; set
    `layers` to that of the whole encoder for the published counts.

    `ratio` was 0.1 in the last stage of training and is 0.8 for pictures and 0.2 for the frames of videos in use. The published
    slow-fast setting, whose first frame keeps all, is two calls of the encoder, the first without the method: pictures of one
    call keep equally many. The released SigLIP variant protects the first patch as if it were a class token; not so here.
    `keep` merges evenly over all blocks until exactly that many patches are left; `r` sets the merges of a block.
    """

    ratio: float = 0.2
    keep: int | float | None = None
    layers: int | None = None
    r: int | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.keep is not None:
            check_keep(self.keep)
        for name in ("layers", "r"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < (name == "layers")):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")

    def removed(self, n: int, depth: int) -> list[int]:
        if self.r is not None:
            return [self.r] * depth
        layers = self.layers or depth
        if layers < depth:
            raise ValueError(f"auroracap(layers={layers}) is told of fewer blocks than the {depth} that are used.")
        share = 1 - Fraction(str(self.ratio))
        return [n * share.numerator // (share.denominator * layers)] * depth
