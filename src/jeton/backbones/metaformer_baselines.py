"""MetaFormer baselines: the same skeleton with the plainest token mixers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..registry import register
from ._timm import Backbone, Size, timm

SHAPES = {  # PoolFormer's: depths and widths of the four stages
    "s12": ((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": ((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": ((6, 6, 18, 6), (64, 128, 320, 512)),
    "m36": ((6, 6, 18, 6), (96, 192, 384, 768)),
    "m48": ((8, 8, 24, 8), (96, 192, 384, 768)),
}


class RandomMixing(nn.Module):
    """Mixes the N positions of a map (B, C, H, W), N = H W, by one random matrix (N, N) whose rows sum to 1: softmax over rows of
    uniform numbers. It is kept with the weights and never trained. Raises ValueError for a map of another size."""

    def __init__(self, dim: int, tokens: Mapping[int, int], device: Any = None, dtype: Any = None, **_: Any) -> None:
        super().__init__()
        n = tokens[dim]
        self.matrix = nn.Parameter(torch.rand(n, n, device=device, dtype=dtype).softmax(-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        if flat.shape[-1] != len(self.matrix):
            raise ValueError(
                f"this RandFormer was made for maps of {len(self.matrix)} positions and got {flat.shape[-1]}: its "
                "random matrices fix the image size; make it with img_size=<the side of your images>."
            )
        return (flat @ self.matrix.T).view_as(x)


@register(
    title="MetaFormer Baselines for Vision",
    year=2022,
    source="arXiv:2210.13452",
    family="backbone",
    stage="backbone",
    headline="CAFormer-B36 85.5 % on ImageNet-1K at 224; identity mapping alone above 80 %",
    training_free=False,
)
class MetaFormerBaseline(Backbone):
    """Four stages of blocks x + mixer(norm(x)), x + mlp(norm(x)), residuals scaled per channel in the last two stages, with the
    activation StarReLU(x) = s relu(x)² + b, s and b learned. What differs is the mixer:

    identityformer_*  none at all
    randformer_*      one frozen random matrix per block in stages 3 and 4 (see `RandomMixing`), none before; `img_size` is fixed
    poolformerv2_*    3 x 3 average minus the input
    convformer_*      separable convolution, 7 x 7
    caformer_*        separable convolution in stages 1 and 2, attention in stages 3 and 4

    The last three are timm's; the first two are timm's skeleton with mixers it does not keep.
    """

    sizes: ClassVar[Mapping[str, Size]] = {
        **{
            f"identityformer_{shape}": Size(None, params, macs, top1)
            for shape, params, macs, top1 in (
                ("s12", 11_891_712, 1.812, 74.6),
                ("s24", None, None, None),
                ("s36", None, None, None),
                ("m36", None, None, None),
                ("m48", 73_346_056, 11.533, 80.4),
            )
        },
        **{
            f"randformer_{shape}": Size(None, params, macs, top1)
            for shape, params, macs, top1 in (
                ("s12", 11_891_712 + 235_298, 1.889, 76.6),
                ("s24", None, None, None),
                ("s36", None, None, None),
                ("m36", None, None, None),
                ("m48", 74_287_248, 11.902, 81.4),
            )
        },
        "poolformerv2_s12": Size("poolformerv2_s12", 11_891_712, None, 78.0),
        **{f"poolformerv2_{shape}": Size(f"poolformerv2_{shape}") for shape in ("s24", "s36", "m36", "m48")},
        "convformer_s18": Size("convformer_s18", 26_774_448, 3.941, 83.0),
        "convformer_s36": Size("convformer_s36", 40_012_152, 7.640, 84.1),
        "convformer_m36": Size("convformer_m36", 57_051_640, 12.842, 84.5),
        "convformer_b36": Size("convformer_b36", 99_882_616, 22.629, 84.8),
        "caformer_s18": Size("caformer_s18", 26_341_656, 4.107, 83.6),
        "caformer_s36": Size("caformer_s36", 39_297_102, 7.972, 84.5),
        "caformer_m36": Size("caformer_m36", 56_204_878, 13.241, 85.2),
        "caformer_b36": Size("caformer_b36", 98_753_614, 23.161, 85.5),
    }

    def build(self, size: Size, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
        if size.timm is not None:
            return super().build(size, num_classes, pretrained, options)
        if pretrained:
            raise ValueError(f"timm keeps no weights of {self.size}; make it with pretrained=False.")
        timm()
        from timm.models.metaformer import GroupNorm1NoBias, MetaFormer

        kind, _, shape = self.size.partition("_")
        depths, dims = SHAPES[shape]
        side = options.pop("img_size", 224)
        mixers: Any = nn.Identity
        if kind == "randformer":
            mixers = [nn.Identity, nn.Identity, RandomMixing, RandomMixing]
            options["tokens"] = {dim: math.ceil(side / stride) ** 2 for dim, stride in zip(dims[2:], (16, 32))}
        return MetaFormer(
            depths=depths,
            dims=dims,
            token_mixers=mixers,
            norm_layers=GroupNorm1NoBias,
            use_mlp_head=False,
            num_classes=num_classes,
            **options,
        )
