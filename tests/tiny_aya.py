"""Tiny Aya Vision: tiles of 8 x 8 patches, 2 x 2 of which make a token; three layers slide, one sees everything without RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny

WINDOW = 60  # longer than an image, shorter than the longest prompts
TILE, TOKENS = 8 * tiny.PATCH, 16
MARKS = (tiny.START, tiny.END, 7, 8)  # begin and end of an image, a tile, the thumbnail


def tiny_cohere2(window: int = WINDOW) -> transformers.Cohere2Config:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return transformers.Cohere2Config(
        **tiny._text(), max_position_embeddings=1024, pad_token_id=tiny.PAD, sliding_window=window, layer_types=kinds
    )


def tiny_aya_vision(window: int = WINDOW) -> nn.Module:
    config = transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny.vision(vision_use_head=False, image_size=TILE)).to_dict(),
        text_config=tiny_cohere2(window).to_dict(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        downsample_factor=2,
        image_token_id=tiny.IMAGE,
    )
    return tiny.ready(transformers.AyaVisionForConditionalGeneration(config))


def _pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Images are so many tiles, with a thumbnail behind where there are several."""
    tiles = [count + (count > 1) for (count,) in images]
    pixels = torch.randn(sum(tiles), 3, TILE, TILE, generator=generator)
    return {"pixel_values": pixels}, [count * TOKENS for count in tiles], [_written(count) for (count,) in images]


def _written(tiles: int) -> Tensor:
    start, end, tile, thumbnail = MARKS
    shown = [tile, *[tiny.IMAGE] * TOKENS] * (tiles if tiles > 1 else 0)
    return torch.tensor([start, *shown, thumbnail, *[tiny.IMAGE] * TOKENS, end])


tiny.BUILDERS |= {
    "AyaVisionForConditionalGeneration": tiny_aya_vision,
    "AyaVisionModel": lambda: tiny_aya_vision().model,
}
tiny.SHAPES["aya_vision"] = [((2,),), ((1,), (2,)), ((1,),)]
tiny.PICTURES["aya_vision"] = _pictures
tiny.TILE["aya_vision"] = (1,)
