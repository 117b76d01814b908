"""Qwen2.5-VL: a packed, windowed tower, a 2x2 patch merger, and positions with three rows (time, height, width)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import Geometry
from .base import Encoder, Inputs, Parts, VisionLanguage, adapter


@adapter("Qwen2_5_VisionTransformerPretrainedModel")
class Qwen25Tower(Encoder):
    packed = True

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.norm1, block.attn, block.norm2, block.mlp)

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        return [Geometry.picture(h, w, frames=t) for t, h, w in inputs["grid_thw"].tolist()]

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        """The tower attends in windows of permuted 2x2 groups: join the calls and put the groups back."""
        joined = torch.cat(record, dim=-1)
        order = self._windows(inputs["grid_thw"])
        group = self.model.spatial_merge_unit
        back = torch.argsort(order)
        return joined.unflatten(-1, (-1, group))[..., back, :].flatten(-2)

    def keys(self, block: int, n: int) -> int:
        if block in self.model.fullatt_block_indexes:
            return n
        return min(n, (self.model.window_size // self.model.patch_size) ** 2)

    @property
    def dims(self) -> tuple[int, int, bool]:
        return self.model.config.hidden_size, self.model.config.intermediate_size, True

    def _windows(self, grid: Tensor) -> Tensor:
        model = self.model
        if hasattr(model, "get_window_index"):
            index = model.get_window_index(grid)[0]
        else:
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

            index = get_vision_window_index(
                grid,
                spatial_merge_size=model.spatial_merge_size,
                window_size=model.window_size,
                patch_size=model.patch_size,
                kwargs={},
            )[0]
        return torch.as_tensor(index, device=grid.device)


@adapter("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
class Qwen25VL(VisionLanguage):
    rotary_rows = 3

    def vision(self) -> Encoder:
        return Qwen25Tower(self.base.visual)

    def streams(self) -> dict[str, str]:
        return {"image": "get_image_features", "video": "get_video_features"}

    def visual(self, input_ids: Tensor, stream: str) -> Tensor:
        return input_ids == getattr(self.model.config, f"{stream}_token_id")

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """A token is a 2x2 group of consecutive patches."""
        side = self.base.visual.spatial_merge_size
        grids = inputs[f"{stream}_grid_thw"].tolist()
        return [Geometry.picture(h // side, w // side, side**2, frames=t) for t, h, w in grids]
