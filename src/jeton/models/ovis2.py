"""Ovis2: tiles whose 2x2 patches together choose from a table of visual words; indicator tokens stand around and between tiles.

The thumbnail comes first, then the crops row by row: START thumbnail GRID crop COL crop ROW crop COL crop END. Indicators are
text to jeton, which stays; the model writes rows of its table there when pixels come.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..layout import Geometry
from .base import Encoder, Inputs, Parts, VisionLanguage
from .internvl import seams, side_by_side
from .registry import adapter


class Ovis2Tower(Encoder):
    """Its position embeddings are of one size."""

    resizable = False
    fixed = ("has position embeddings for pictures of one size alone", "divprune or another method of the site entry")
    gated_mlp = True
    pixel_mean = tuple(OPENAI_CLIP_MEAN)
    pixel_std = tuple(OPENAI_CLIP_STD)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.transformer.encoder.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.rms_norm1, block.attention, block.rms_norm2, block.ffn)


@adapter("Ovis2ForConditionalGeneration", "Ovis2Model")
class Ovis2(VisionLanguage):
    mixes = True
    told_by_prompt = True
    marks = "the indicator tokens around its tiles"

    @property
    def projector(self) -> nn.Module:  # type: ignore[override]
        """What maps a square of patches to scores over the table."""
        return self.base.vision_tower.head_linear

    @property
    def projection(self) -> float:
        """The scores weigh the rows of the table, too."""
        return super().projection + 2 * self.base.visual_embeddings_table.weight.numel()

    def vision(self) -> Encoder:
        return Ovis2Tower(self.base.vision_tower)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        pixels, config = inputs["pixel_values"], self.base.vision_tower.config
        return [Geometry.blocks(*self.encoder.grid(pixels), config.hidden_stride)] * pixels.shape[0]

    def prompted(self, geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> tuple[Geometry, ...]:
        """One GRID, COL or ROW stands between tiles of an image."""
        inside = self.base.config.visual_indicator_token_ids[1:4]
        images: list[list[int]] = []
        for between in seams(geometry, input_ids, visual):
            if between is not None and len(between) == 1 and between[0] in inside:
                images[-1] += between
            else:
                images.append([])
        return tuple(self._image(geometry[0], marks) for marks in images) or geometry

    def _image(self, tile: Geometry, marks: list[int]) -> Geometry:
        """An image of a thumbnail and crops, by the marks between them."""
        grid, _, row = self.base.config.visual_indicator_token_ids[1:4]
        rows = 1 + marks.count(row)
        if not marks:
            return tile
        if marks[0] != grid or marks.count(grid) > 1 or len(marks) % rows:
            return side_by_side(tile, 1 + len(marks))
        return _tiled(tile, rows, len(marks) // rows)


@lru_cache(maxsize=64)
def _tiled(tile: Geometry, rows: int, cols: int) -> Geometry:
    crops = rows * cols
    return Geometry.joined([tile] * (1 + crops), ("thumbnail",) + ("crop",) * crops, (rows, cols))
