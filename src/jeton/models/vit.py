"""ViT, DeiT and DINOv2 encoders: pre-norm blocks with special tokens in front."""

from __future__ import annotations

from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .base import Encoder, Parts
from .registry import adapter


@adapter("ViTModel")
class ViT(Encoder):
    prefix = 1
    has_class = True

    @property
    def blocks(self) -> list[nn.Module]:
        inner = getattr(self.model, "encoder", self.model)
        return list(inner.layer if hasattr(inner, "layer") else inner.layers)

    def parts(self, block: nn.Module) -> Parts:
        drop = getattr(block, "dropout", nn.Identity())
        return Parts(block.layernorm_before, block.attention, block.layernorm_after, block.mlp, drop1=drop, drop2=drop)


@adapter("DeiTModel")
class DeiT(ViT):
    """A ViT with a distillation token beside the class token."""

    prefix = 2
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)


class LayerScaled(ViT):
    """Layer scale and stochastic depth around each half of the block."""

    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(
            block.norm1,
            block.attention,
            block.norm2,
            block.mlp,
            scale1=block.layer_scale1,
            scale2=block.layer_scale2,
            drop1=block.drop_path,
            drop2=block.drop_path,
        )


@adapter("Dinov2Model")
class Dinov2(LayerScaled):
    @property
    def gated_mlp(self) -> bool:  # type: ignore[override]
        return self.model.config.use_swiglu_ffn

    @property
    def mlp_width(self) -> int:
        wide = int(self.width * self.model.config.mlp_ratio)
        return -(-(wide * 2 // 3) // 8) * 8 if self.gated_mlp else wide  # as many weights in three matrices as in two


@adapter("Dinov2WithRegistersModel")
class Dinov2WithRegisters(Dinov2):
    """Register tokens stand between the class token and the patches."""

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return 1 + self.model.config.num_register_tokens
