"""I-JEPA encoders: a ViT without any special token."""

from __future__ import annotations

from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .registry import adapter
from .vit import ViT


@adapter("IJepaModel")
class IJepa(ViT):
    """Its classifier is handed the mean of all patches."""

    prefix = 0
    has_class = False
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    def averaged(self, top: nn.Module) -> nn.Module | None:
        return getattr(top, "classifier", None)
