"""Gemma 3: patches are averaged in squares and then projected; the tokens of one image see each other, within the window where a
layer has one.

What its processor crops out of an image (pan and scan) it shows as images of their own, and so they are here.
"""

from __future__ import annotations

from ..layout import Album, Geometry
from .base import Encoder, Inputs, VisionLanguage
from .registry import adapter, encoder_in


@adapter("Gemma3ForConditionalGeneration", "Gemma3Model")
class Gemma3(VisionLanguage):
    mixes = True
    masked_above = True

    def vision(self) -> Encoder:
        return encoder_in(self.base.vision_tower)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        projector = self.base.multi_modal_projector
        side, step = projector.patches_per_image, projector.kernel_size
        return [Geometry.blocks(side, side, step)] * inputs["pixel_values"].shape[0]

    def between(self, length: int, album: Album) -> float:
        return 2.0 * sum(album.counts) * self.base.multi_modal_projector.mm_input_projection_weight.numel()
