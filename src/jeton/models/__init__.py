"""What jeton knows of each model family. One small file per family; `adapt` finds the view for a model."""

from . import bridged, clip, idefics3, llava, llava_next, llava_onevision, pixtral, qwen2_5_vl, qwen2_vl, vit
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
    "idefics3",
    "llava",
    "llava_next",
    "llava_onevision",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "vit",
]
