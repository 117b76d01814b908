"""What jeton knows of each model family. One small file per family; `adapt` finds the view for a model."""

from . import (
    beit,
    bridged,
    clip,
    dinov3,
    ijepa,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    timm_vit,
    videomae,
    vit,
    vit_mae,
)
from .base import Encoder, Parts, Registry, VisionLanguage, adapt, adapter
from .clip_text import ClipText

__all__ = [
    "ClipText",
    "Encoder",
    "Parts",
    "Registry",
    "VisionLanguage",
    "adapt",
    "adapter",
    "beit",
    "bridged",
    "clip",
    "dinov3",
    "ijepa",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "timm_vit",
    "videomae",
    "vit",
    "vit_mae",
]
