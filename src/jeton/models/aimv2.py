"""AIMv2 encoders: RMS norms, a gated MLP, and no special token."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .base import Encoder, Parts
from .registry import adapter


@adapter("Aimv2VisionModel")
class Aimv2(Encoder):
    """Only those made for native resolution take pictures of other sizes."""

    example: ClassVar = {"is_native": True}
    gated_mlp = True
    pixel_mean = tuple(OPENAI_CLIP_MEAN)
    pixel_std = tuple(OPENAI_CLIP_STD)
    fixed = ("has position embeddings of one size", "a checkpoint made for native resolution, or pool")

    @property
    def resizable(self) -> bool:  # type: ignore[override]
        return self.model.config.is_native

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.rms_norm1, block.attention, block.rms_norm2, block.ffn, residual_first=True)

    @property
    def probe(self) -> nn.Module | None:
        return getattr(self.model, "head", None)
