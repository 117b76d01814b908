"""A tiny Qwen2-VL and Qwen2.5-VL, their towers, and prompts with grids of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import tiny


def _qwen(**tower: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {
        "vision_config": tower,
        "text_config": {**tiny._text(), "max_position_embeddings": 1024, "rope_parameters": rope},
        "image_token_id": tiny.IMAGE,
        "video_token_id": tiny.VIDEO,
        "vision_start_token_id": tiny.START,
        "vision_end_token_id": tiny.END,
    }


def tiny_qwen2_vl() -> nn.Module:
    tower = {"depth": 5, "num_heads": 4, "patch_size": tiny.PATCH, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    config = transformers.Qwen2VLConfig(**_qwen(**tower))
    return tiny.ready(transformers.Qwen2VLForConditionalGeneration(config))


def tiny_qwen2_5_vl() -> nn.Module:
    tower = tiny.packed_tower(window_size=4 * tiny.PATCH, fullatt_block_indexes=[1, 4])
    config = transformers.Qwen2_5_VLConfig(**_qwen(**tower))
    return tiny.ready(transformers.Qwen2_5_VLForConditionalGeneration(config))


def tiny_qwen_tower() -> nn.Module:
    return tiny.ready(Qwen2_5_VisionTransformerPretrainedModel(tiny_qwen2_5_vl().config.vision_config))


def tiny_qwen2_tower() -> nn.Module:
    return tiny.ready(Qwen2VisionTransformerPretrainedModel(tiny_qwen2_vl().config.vision_config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[int]]:
    width = 3 * 2 * tiny.PATCH * tiny.PATCH
    kinds: dict[str, list[tuple[int, ...]]] = {"image": [], "video": []}
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    marks = []
    for t, h, w in images:
        kind = "image" if t == 1 else "video"
        kinds[kind].append((t, h, w))
        pixels[kind].append(torch.randn(t * h * w, width, generator=generator))
        marks.append(tiny.IMAGE if t == 1 else tiny.VIDEO)
    inputs: tiny.Inputs = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if kinds[kind]:
            inputs[name] = torch.cat(pixels[kind])
            inputs[f"{kind}_grid_thw"] = torch.tensor(kinds[kind])
    return inputs, [t * h * w // 4 for t, h, w in images], marks


tiny.BUILDERS |= {
    "Qwen2_5_VisionTransformerPretrainedModel": tiny_qwen_tower,
    "Qwen2VisionTransformerPretrainedModel": tiny_qwen2_tower,
    "Qwen2VLForConditionalGeneration": tiny_qwen2_vl,
    "Qwen2VLModel": lambda: tiny_qwen2_vl().model,
    "Qwen2_5_VLForConditionalGeneration": tiny_qwen2_5_vl,
    "Qwen2_5_VLModel": lambda: tiny_qwen2_5_vl().model,
}
tiny.SHAPES |= {
    "qwen2": [((1, 8, 12),), ((1, 6, 6), (1, 8, 4)), ((2, 6, 8),)],
}
tiny.PICTURES |= {
    "qwen2": pictures,
}
