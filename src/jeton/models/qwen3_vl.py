"""Qwen3-VL: a Qwen tower with interpolated position embeddings, DeepStack features for the first layers of its language model,
and one run of tokens for each frame of a video."""

from __future__ import annotations

from torch import Tensor

from .base import Inputs
from .qwen2_vl import Qwen2VL, QwenTower
from .registry import adapter


@adapter("Qwen3VLVisionModel")
class Qwen3Tower(QwenTower):
    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.5, 0.5, 0.5)
    outputs = ("pooler_output", "deepstack_features")

    def shortened(self, inputs: Inputs, kept: Tensor) -> dict:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        model = self.model
        indices, weights = get_vision_interpolation_indices_and_weights(
            inputs["grid_thw"],
            num_grid_per_side=model.num_grid_per_side,
            mode=model.interpolation_mode,
            align_corners=model.interpolation_align_corners,
            spatial_merge_size=model.spatial_merge_size,
        )
        return {**super().shortened(inputs, kept), "interp_indices": indices[kept], "interp_weights": weights[kept]}


@adapter("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
class Qwen3VL(Qwen2VL):
    tower = Qwen3Tower
    deepstack = ("deepstack_visual_embeds", "_deepstack_process")
