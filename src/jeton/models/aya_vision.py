"""Aya Vision: squares of patches make tokens, and Cohere 2 reads them: layers whose halves run beside each other, most with RoPE
and a window, some without either.

Large images are cut into tiles, each announced by its name in the prompt; the last one is the thumbnail. How they lie over the
picture is known to the processor alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ..layout import Geometry
from .base import Inputs
from .internvl import seams, side_by_side
from .llava import Llava
from .registry import adapter


@adapter("AyaVisionForConditionalGeneration", "AyaVisionModel")
class AyaVision(Llava):
    # the default tower has a width that its heads do not divide
    example: ClassVar = {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}}
    mixes = True
    marks = "the names of its tiles"
    told_by_prompt = True

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        pixels = inputs["pixel_values"]
        side, _ = self.encoder.grid(pixels)
        return [Geometry.blocks(side, side, self.model.config.downsample_factor)] * pixels.shape[0]

    def prompted(self, geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> tuple[Geometry, ...]:
        """Tiles of one image have one token between them, a tile's name; those of two have the end and the beginning of an image
        too."""
        images: list[int] = []
        for between in seams(geometry, input_ids, visual):
            if between is not None and len(between) == 1:
                images[-1] += 1
            else:
                images.append(1)
        return tuple(side_by_side(geometry[0], tiles) for tiles in images) or geometry

    def _rotate(self, layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        if self.attention(layer).sliding_window is None:
            return lambda q, k, cos, sin: (q, k)
        return super()._rotate(layer)
