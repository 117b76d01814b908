"""DaViT: attention over windows of positions, then attention over groups of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..registry import register
from ._timm import Backbone, Size


@register(
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    source="arXiv:2204.03645",
    family="backbone",
    stage="backbone",
    headline="82.8 to 90.4 % on ImageNet-1K at linear cost",
    training_free=False,
)
class DaViT(Backbone):
    """Pairs of blocks: the first attends within windows of 7 x 7 positions, the second lets channels attend to channels, so that
    every token sees the whole picture at a cost linear in the number of positions.

    Each block is x + conv(x), x + attention(norm(x)), x + conv(x), x + mlp(norm(x)), conv depthwise 3 x 3. Channel attention
    splits C channels into groups of d = 32 and takes, within a group, A = softmax((k / sqrt(d))ᵀ v) of shape (d, d) and A qᵀ: the
    affinity comes of k and v, and q is what is mixed. Any height and width; windows are padded right and below.

    It is timm's `davit_*`. The sizes `base_fl` and `huge_fl` are the towers of Florence-2, which scale channel attention by the
    number of positions instead (timm's `channel_attn_v2`); they have no classes of their own.
    """

    sizes: ClassVar[Mapping[str, Size]] = {
        "tiny": Size("davit_tiny", 28_360_168, 4.522, 82.8),
        "small": Size("davit_small", 49_745_896, 8.773, 84.2),
        "base": Size("davit_base", 87_954_408, 15.474, 84.6),
        "large": Size("davit_large", 196_811_752, 34.54),
        "huge": Size("davit_huge"),
        "giant": Size("davit_giant"),
        "base_fl": Size("davit_base_fl"),
        "huge_fl": Size("davit_huge_fl"),
    }
