"""Qwen2-VL: a packed tower that attends within frames, a 2x2 patch merger, and positions with three rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import Geometry
from .base import Encoder, Inputs, Parts, VisionLanguage, adapter


@adapter("Qwen2VisionTransformerPretrainedModel")
class Qwen2Tower(Encoder):
    packed = True

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.norm1, block.attn, block.norm2, block.mlp)

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        return [Geometry.picture(h, w, frames=t) for t, h, w in inputs["grid_thw"].tolist()]

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.cat(record, dim=-1)

    @property
    def dims(self) -> tuple[int, int, bool]:
        config = self.model.config
        return config.embed_dim, config.embed_dim * config.mlp_ratio, False


@adapter("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
class Qwen2VL(VisionLanguage):
    rotary_rows = 3
    mixes = True
    tower: type[Encoder] = Qwen2Tower

    def vision(self) -> Encoder:
        return self.tower(self.base.visual)

    def streams(self) -> dict[str, str]:
        return {"image": "get_image_features", "video": "get_video_features"}

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """A token is a 2x2 group of consecutive patches."""
        side = self.base.visual.spatial_merge_size
        grids = inputs[f"{stream}_grid_thw"].tolist()
        return [Geometry.picture(h // side, w // side, side**2, frames=t) for t, h, w in grids]
