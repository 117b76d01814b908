"""Qwen2.5-VL: Qwen2-VL with a windowed tower."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs
from .qwen2_vl import Qwen2VL, QwenTower, ends_among
from .registry import adapter


@adapter("Qwen2_5_VisionTransformerPretrainedModel")
class Qwen25Tower(QwenTower):
    home = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    gated_mlp = True

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        """The tower attends in windows of permuted 2x2 groups: join the calls and put the groups back."""
        joined = torch.cat(record, dim=-1)
        order = inputs["window_index"] if "window_index" in inputs else self._windows(inputs["grid_thw"])[0]
        group = self.model.spatial_merge_unit
        back = torch.argsort(order)
        return joined.unflatten(-1, (-1, group))[..., back, :].flatten(-2)

    def shortened(self, inputs: Inputs, kept: Tensor) -> dict:
        """The windows are those of the whole grid, each with the groups that are left of it."""
        group = self.model.spatial_merge_unit
        order, ends = (part.to(kept.device) for part in self._windows(inputs["grid_thw"]))
        stays = torch.zeros_like(order, dtype=torch.bool).index_fill(0, kept[::group] // group, True)
        listed = stays[order]
        number = stays.cumsum(0) - 1
        return {
            **super().shortened(inputs, kept),
            "window_index": number[order[listed]],
            "cu_window_seqlens": group * ends_among(listed.nonzero().flatten(), ends // group),
        }

    def keys(self, block: int, n: int) -> int:
        if block in self.model.fullatt_block_indexes:
            return n
        return min(n, (self.model.window_size // self.model.patch_size) ** 2)

    def _windows(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The groups in the order of the windows, and where windows end, in patches."""
        model = self.model
        if hasattr(model, "get_window_index"):
            order, ends = model.get_window_index(grid)
        else:
            from transformers.vision_utils import get_vision_window_index

            order, ends = get_vision_window_index(
                grid, model.spatial_merge_size, window_size=model.window_size, patch_size=model.patch_size
            )
        return torch.as_tensor(order, device=grid.device), torch.as_tensor(ends, device=grid.device)


@adapter("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
class Qwen25VL(Qwen2VL):
    tower = Qwen25Tower
