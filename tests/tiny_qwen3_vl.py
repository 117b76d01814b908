"""A tiny Qwen3-VL, whose first two layers get features of the tower's blocks 1 and 3; a time stands between frames of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny
import tiny_qwen2_vl

TIME = 9


def tiny_qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        vision_config=tiny.packed_tower(num_position_embeddings=36, deepstack_visual_indexes=[1, 3]),
        text_config={**tiny._text(), "head_dim": 16, "max_position_embeddings": 1024, "rope_parameters": rope},
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        vision_start_token_id=tiny.START,
        vision_end_token_id=tiny.END,
    )
    return tiny.ready(transformers.Qwen3VLForConditionalGeneration(config))


def tiny_qwen3_tower() -> nn.Module:
    return tiny.ready(transformers.Qwen3VLVisionModel(tiny_qwen3_vl().config.vision_config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Images are grids (time, height, width) of patches; time above 1 is a video, whose frames are runs of their own."""
    inputs, counts, marks = tiny_qwen2_vl.pictures(net, images, generator)
    return (
        inputs,
        counts,
        [written(frames, count // frames, mark) for (frames, *_), count, mark in zip(images, counts, marks, strict=True)],
    )


def written(frames: int, each: int, mark: int) -> Tensor:
    return torch.tensor(([mark] * each + [TIME]) * (frames - 1) + [mark] * each)


tiny.BUILDERS |= {
    "Qwen3VLVisionModel": tiny_qwen3_tower,
    "Qwen3VLForConditionalGeneration": tiny_qwen3_vl,
    "Qwen3VLModel": lambda: tiny_qwen3_vl().model,
}
tiny.SHAPES["qwen3_vl"] = tiny.SHAPES["qwen2"]
tiny.PICTURES["qwen3_vl"] = pictures
tiny.COORDINATES |= {"qwen3_vl"}
