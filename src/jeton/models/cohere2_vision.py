"""Cohere 2 Vision (Command A Vision): Aya Vision's tiles, pixel shuffle and language model, with the encoder's last features.

Tiles bear no names in the prompt: each ends with a line break, and the last one is the thumbnail.
"""

from __future__ import annotations

from typing import ClassVar

from .aya_vision import AyaVision
from .registry import adapter


@adapter("Cohere2VisionForConditionalGeneration", "Cohere2VisionModel")
class Cohere2Vision(AyaVision):
    example: ClassVar = {}
    marks = "the line breaks behind its tiles"
