"""A tiny InternVL. Images are numbers of tiles, in one run of image tokens; frames of a video are images to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import nn

import tiny

SIDE, TOKENS = 6, 9  # 6 x 6 patches make 3 x 3 tokens


def tiny_internvl() -> nn.Module:
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tiny.vision(image_size=SIDE * tiny.PATCH), use_qk_norm=True),
        text_config=transformers.Qwen2Config(**tiny._text(), max_position_embeddings=1024),
        image_token_id=tiny.IMAGE,
        image_seq_length=TOKENS,
    )
    return tiny.ready(transformers.InternVLForConditionalGeneration(config))


def tiny_internvl_tower() -> nn.Module:
    config = transformers.InternVLVisionConfig(**tiny.vision())
    return tiny.ready(transformers.InternVLVisionModel(config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[int]]:
    side = SIDE * tiny.PATCH
    pixels = torch.randn(sum(tiles for (tiles,) in images), 3, side, side, generator=generator)
    return {"pixel_values": pixels}, [tiles * TOKENS for (tiles,) in images], [tiny.IMAGE] * len(images)


tiny.BUILDERS |= {
    "InternVLVisionModel": tiny_internvl_tower,
    "InternVLForConditionalGeneration": tiny_internvl,
    "InternVLModel": lambda: tiny_internvl().model,
}
tiny.SHAPES["internvl"] = [((4,),), ((1,), (3,)), ((1,), (1,))]
tiny.PICTURES["internvl"] = pictures
tiny.TILE["internvl"] = (1,)
