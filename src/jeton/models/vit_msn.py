"""ViT-MSN encoders: a ViT without a pooler; its checkpoints normalise as ImageNet does, not as ViT's."""

from __future__ import annotations

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .registry import adapter
from .vit import ViT


@adapter("ViTMSNModel")
class ViTMSN(ViT):
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)
