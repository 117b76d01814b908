"""Qwen2-VL: a packed tower that attends within frames, a 2x2 patch merger, and positions with three rows."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..layout import Geometry
from .base import Encoder, Inputs, Parts, VisionLanguage
from .registry import adapter


class QwenTower(Encoder):
    """What the towers of the family have in common."""

    packed = True
    pixel_mean = tuple(OPENAI_CLIP_MEAN)
    pixel_std = tuple(OPENAI_CLIP_STD)
    # since then a tower takes positions and sequence ends as arguments
    groups = find_spec("transformers.vision_utils") is not None

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.norm1, block.attn, block.norm2, block.mlp)

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        return [Geometry.picture(h, w, frames=t) for t, h, w in inputs["grid_thw"].tolist()]

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.cat(record, dim=-1)

    def patches(self, pixels: Tensor) -> Tensor:
        return pixels.unflatten(-1, (self.model.config.in_channels, -1))

    def shortened(self, inputs: Inputs, kept: Tensor) -> dict:
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

        grid = inputs["grid_thw"]
        return {
            **inputs,
            "hidden_states": inputs["hidden_states"][kept],
            "position_ids": get_vision_position_ids(grid, self.model.spatial_merge_size)[kept],
            "cu_seqlens": ends_among(kept, get_vision_cu_seqlens(grid)),
        }


@adapter("Qwen2VisionTransformerPretrainedModel")
class Qwen2Tower(QwenTower):
    home = "transformers.models.qwen2_vl.modeling_qwen2_vl"

    @property
    def width(self) -> int:
        return self.model.config.embed_dim  # its hidden_size is the language model's

    @property
    def mlp_width(self) -> int:
        return self.width * self.model.config.mlp_ratio


def ends_among(kept: Tensor, ends: Tensor) -> Tensor:
    """Where sequences that end at `ends` (first 0) of the whole end among the tokens `kept`; those that lose all are gone."""
    return torch.searchsorted(kept, ends.to(kept.dtype)).unique_consecutive().to(torch.int32)


@adapter("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
class Qwen2VL(VisionLanguage):
    rotary_rows = 3
    mixes = True
    videos = True
    tower: type[Encoder] = Qwen2Tower

    def vision(self) -> Encoder:
        return self.tower(self.base.visual)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """A token is a 2x2 group of consecutive patches."""
        side = self.base.visual.spatial_merge_size
        grids = inputs[f"{stream}_grid_thw"].tolist()
        return [Geometry.picture(h // side, w // side, side**2, frames=t) for t, h, w in grids]
