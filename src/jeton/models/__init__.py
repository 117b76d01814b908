"""What jeton knows of each model family. One small file per family; `adapt` finds the view for a model."""

from . import (
    bridged,
    clip,
    glm4v,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    ovis2,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    vit,
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
    "bridged",
    "clip",
    "glm4v",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "ovis2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "vit",
]
