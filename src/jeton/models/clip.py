"""CLIP and SigLIP vision towers: the same pre-norm block; CLIP has a class token in front, SigLIP has none."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..layout import Geometry
from .base import Encoder, Inputs, Parts, adapter


class _Tower(Encoder):
    @property
    def blocks(self) -> list[nn.Module]:
        inner = getattr(self.model, "vision_model", self.model)
        return list(inner.encoder.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.layer_norm1, block.self_attn, block.layer_norm2, block.mlp)


@adapter("CLIPVisionModel")
class Clip(_Tower):
    prefix = 1
    has_class = True
    pixel_mean = tuple(OPENAI_CLIP_MEAN)
    pixel_std = tuple(OPENAI_CLIP_STD)


@adapter("SiglipVisionModel")
class Siglip(_Tower):
    @property
    def probe(self) -> nn.Module | None:
        return getattr(self.model, "head", None)


@adapter("Siglip2VisionModel")
class Siglip2(_Tower):
    """NaFlex: pictures of any shape as rows of flattened patches, padded on the right and masked."""

    resizable = False

    @property
    def pooling(self) -> nn.Module | None:  # type: ignore[override]
        return getattr(self.model, "head", None)

    @property
    def probe(self) -> nn.Module | None:
        return self.pooling

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        longest = inputs["pixel_values"].shape[1]
        shapes = inputs["spatial_shapes"].tolist()
        if any(height * width > longest for height, width in shapes):
            raise ValueError("spatial_shapes describe more patches than pixel_values hold.")
        return [Geometry.picture(height, width) for height, width in shapes]

    def patches(self, pixels: Tensor) -> Tensor:
        return pixels.unflatten(-1, (-1, self.model.config.num_channels)).transpose(-1, -2)

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        mask = inputs.get("pixel_attention_mask")
        return None if mask is None else mask.bool()
