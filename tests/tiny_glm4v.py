"""A tiny GLM-4V. Videos are written with image tokens, one run a frame; no batch has both images and videos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny
import tiny_qwen2_vl
from tiny_qwen3_vl import written


def tiny_glm4v() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    config = transformers.Glm4vConfig(
        vision_config=tiny.packed_tower(image_size=6 * tiny.PATCH),
        text_config={**tiny._text(), "max_position_embeddings": 1024, "rope_parameters": rope},
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        image_start_token_id=tiny.START,
        image_end_token_id=tiny.END,
        video_start_token_id=7,
        video_end_token_id=8,
    )
    return tiny.ready(transformers.Glm4vForConditionalGeneration(config))


def tiny_glm4v_tower() -> nn.Module:
    return tiny.ready(transformers.Glm4vVisionModel(tiny_glm4v().config.vision_config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    inputs, counts, _ = tiny_qwen2_vl.pictures(net, images, generator)
    marks = [written(frames, count // frames, tiny.IMAGE) for (frames, *_), count in zip(images, counts, strict=True)]
    return inputs, counts, marks


tiny.BUILDERS |= {
    "Glm4vVisionModel": tiny_glm4v_tower,
    "Glm4vForConditionalGeneration": tiny_glm4v,
    "Glm4vModel": lambda: tiny_glm4v().model,
}
tiny.SHAPES["glm4v"] = [((1, 8, 12),), ((1, 6, 6), (1, 8, 4)), ((1, 6, 8),)]
tiny.PICTURES["glm4v"] = pictures
tiny.COORDINATES |= {"glm4v"}
tiny.BY_ONE |= {"glm4v"}
