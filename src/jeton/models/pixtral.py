"""Pixtral's tower, alone, in Mistral 3 (where 2x2 patches make a token) and in LLaVA (where each patch does).

Pictures of different sizes are packed into one sequence and kept apart by a mask. In the prompt a break token stands behind each
row of a picture, which is text to the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..layout import Geometry
from ..method import Unsupported
from ..ops import pixels
from .base import Encoder, Inputs, Parts, VisionLanguage
from .registry import adapter, encoder_in

BREAKS = "the break tokens behind the rows of a picture"


@adapter("PixtralVisionModel")
class Pixtral(Encoder):
    packed = True
    gated_mlp = True
    pixel_mean = tuple(OPENAI_CLIP_MEAN)
    pixel_std = tuple(OPENAI_CLIP_STD)

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return "flash" not in (self.model.config._attn_implementation or "")

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.transformer.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.attention_norm, block.attention, block.ffn_norm, block.feed_forward)

    def grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        """Patches per column and row of every picture; pixels to the right and below are padding."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            return [self.grid(inputs["pixel_values"])] * inputs["pixel_values"].shape[0]
        size = self.patch_size
        return [(height // size, width // size) for height, width in torch.as_tensor(sizes).tolist()]

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        return [Geometry.picture(*grid) for grid in self.grids(inputs)]

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.cat(record, dim=-1)

    def grey(self, inputs: Inputs, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Tensor:
        padded = inputs["pixel_values"]
        height, width = self.grid(padded)
        items = enumerate(self.geometry(inputs))
        real = torch.cat([(number * height + item.row) * width + item.col for number, item in items])
        patches = self.patches(padded).flatten(0, 1)[real.to(padded.device)][None]
        return pixels.grey(patches, self.pixel_mean if mean is None else mean, self.pixel_std if std is None else std)


@adapter("Mistral3ForConditionalGeneration", "Mistral3Model")
class Mistral3(VisionLanguage):
    mixes = True
    marks = BREAKS

    @property
    def projector(self) -> nn.Module:  # type: ignore[override]
        return self.base.multi_modal_projector

    def vision(self) -> Pixtral:
        tower = encoder_in(self.base.vision_tower)
        if not isinstance(tower, Pixtral):
            raise Unsupported(f"{self.name} has a {tower.name} for a tower; jeton reads Mistral 3 with a PixtralVisionModel.")
        return tower

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """A token is a square of patches; where the grid is odd its last row or column is left out."""
        side = self.model.config.spatial_merge_size
        return [Geometry.blocks(*grid, side) for grid in self.vision().grids(inputs)]
