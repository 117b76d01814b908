"""CLIP and SigLIP vision towers: the same pre-norm block; CLIP has a class token in front, SigLIP has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..layout import Geometry
from .base import Encoder, Inputs, Parts
from .registry import adapter


class _Tower(Encoder):
    @property
    def blocks(self) -> list[nn.Module]:
        inner = getattr(self.model, "vision_model", self.model)
        return list(inner.encoder.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.layer_norm1, block.self_attn, block.layer_norm2, block.mlp)


class RegisteredEmbeddings(nn.Module):
    """CLIP's embeddings with register tokens (1, R, D) behind the class token; they have no position."""

    def __init__(self, inner: nn.Module, registers: Tensor) -> None:
        super().__init__()
        self.inner, self.register_tokens = inner, nn.Parameter(registers)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.inner(*args, **kwargs)
        return torch.cat([x[:, :1], self.register_tokens.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], 1)


@adapter("CLIPVisionModel")
class Clip(_Tower):
    """The class token in front; registers behind it where they were put there (objectives/ph_reg.py)."""

    has_class = True

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return 1 + getattr(self.model.config, "num_register_tokens", 0)

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
