"""LLaVA-NeXT: a thumbnail and any-resolution crops; the crops are stitched, cut to the picture and given a newline per row."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..layout import NEWLINE, Geometry
from .base import Inputs, adapter
from .llava import Llava


@adapter("LlavaNextForConditionalGeneration", "LlavaNextModel")
class LlavaNext(Llava):
    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        pinpoints = tuple(tuple(point) for point in config.image_grid_pinpoints)
        sizes = inputs["image_sizes"].tolist()
        return [_any_resolution(int(h), int(w), pinpoints, config.vision_config.image_size, side) for h, w in sizes]


@lru_cache(maxsize=256)
def _any_resolution(height: int, width: int, pinpoints: tuple, picture: int, side: int) -> Geometry:
    """The tokens of one image of height x width pixels: the thumbnail row by row, then the stitched crops with newlines."""
    rows, cols = get_anyres_image_grid_shape((height, width), [list(point) for point in pinpoints], picture)
    per = side * side
    thumbnail = torch.arange(per)
    # number every patch of the stitched map, then let the model's own rule cut the padding away
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(cols * side), indexing="ij")
    unit = 1 + (y // side) * cols + x // side
    patch = unit * per + (y % side) * side + x % side
    cut = unpad_image(torch.stack([patch, unit, y % side, x % side]), (height, width))
    line = torch.tensor([-1, NEWLINE, 0, 0])[:, None, None].expand(4, cut.shape[1], 1)
    crops = torch.cat([cut, line], dim=2).flatten(1)
    first = torch.stack([thumbnail, torch.zeros_like(thumbnail), thumbnail // side, thumbnail % side])
    source, unit, row, col = torch.cat([first, crops], dim=1)
    units = 1 + rows * cols
    kinds = ("thumbnail",) + ("crop",) * (units - 1)
    return Geometry.of(source, unit, row, col, [(side, side)] * units, units * per, kinds, crops=(rows, cols))
