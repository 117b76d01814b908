"""InternVL: square tiles, a class token in the tower, and 2x2 patches shuffled into one token behind it.

The tiles of an image are one run of image tokens. How they lie over the picture is known to the processor alone: they are
pictures without an arrangement, of which the last one of several is the thumbnail.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..layout import Geometry
from ..method import Unsupported
from .base import Encoder, Inputs, Parts, VisionLanguage
from .registry import adapter


@adapter("InternVLVisionModel")
class InternVLTower(Encoder):
    """A ViT with learned scales; position embeddings are interpolated to whatever comes in."""

    prefix = 1
    has_class = True
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layer)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(
            block.layernorm_before,
            block.attention,
            block.layernorm_after,
            block.mlp,
            scale1=lambda x: block.lambda_1 * x,
            scale2=lambda x: block.lambda_2 * x,
            drop2=block.dropout,
        )


@adapter("InternVLForConditionalGeneration", "InternVLModel")
class InternVL(VisionLanguage):
    mixes = True
    told_by_prompt = True

    @property
    def projector(self) -> nn.Module:  # type: ignore[override]
        return self.base.multi_modal_projector

    def vision(self) -> Encoder:
        return InternVLTower(self.base.vision_tower)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        config, pixels = self.base.config, inputs["pixel_values"]
        if (inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy) != "default":
            raise Unsupported(
                f"{self.name} hands its class token on, for which pixel shuffle has no place; use "
                'vision_feature_select_strategy="default".'
            )
        height, width = self.encoder.grid(pixels)
        if height != width:
            raise Unsupported(
                f"{self.name} reads every tile as a square, but pixel_values make {height} x {width} patches; let the model's "
                "processor cut pictures into square tiles."
            )
        return [Geometry.blocks(height, width, round(1 / config.downsample_ratio))] * pixels.shape[0]

    def prompted(self, geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> tuple[Geometry, ...]:
        """Tiles of one image follow each other without a token between them."""
        images: list[int] = []
        for between in seams(geometry, input_ids, visual):
            if between is None or between:
                images.append(1)
            else:
                images[-1] += 1
        return tuple(side_by_side(geometry[0], tiles) for tiles in images) or geometry


def seams(geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> list[list[int] | None]:
    """For each of the tiles, all alike, the token ids between it and the one before it in its prompt, None for a prompt's first;
    nothing if the prompts do not hold them a whole number of times (the span map will say so)."""
    each = len(geometry[0])
    copies, rest = divmod(int(visual.sum()), each * len(geometry))
    if copies == 0 or rest:
        return []
    found: list[list[int] | None] = []
    for ids, shown in zip(input_ids.tolist()[::copies], visual.cpu()[::copies], strict=True):  # beams repeat prompts
        starts = shown.nonzero().flatten().tolist()
        starts, ends = starts[::each], starts[each - 1 :: each]
        found += [ids[ends[at - 1] + 1 : start] if at else None for at, start in enumerate(starts)]
    return found


@lru_cache(maxsize=64)
def side_by_side(tile: Geometry, count: int) -> Geometry:
    """Tiles whose arrangement nobody knows, the last one the thumbnail."""
    if count == 1:
        return tile
    return Geometry.joined([tile] * count, ("crop",) * (count - 1) + ("thumbnail",))
