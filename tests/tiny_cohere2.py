"""Tiny Cohere 2 Vision: Aya Vision's tiles and language model; a line break behind every tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny
from tiny_aya import TILE, TOKENS, tiny_cohere2

MARKS = (tiny.START, tiny.END, 7)  # begin and end of an image, a line break


def tiny_cohere2_vision() -> nn.Module:
    config = transformers.Cohere2VisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny.vision(vision_use_head=False, image_size=TILE)).to_dict(),
        text_config=tiny_cohere2().to_dict(),
        downsample_factor=2,
        alignment_intermediate_size=48,
        image_token_id=tiny.IMAGE,
    )
    return tiny.ready(transformers.Cohere2VisionForConditionalGeneration(config))


def _pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Images are so many tiles, with a thumbnail behind where there are several."""
    tiles = [count + (count > 1) for (count,) in images]
    pixels = torch.randn(sum(tiles), 3, TILE, TILE, generator=generator)
    return {"pixel_values": pixels}, [count * TOKENS for count in tiles], [_written(count) for count in tiles]


def _written(tiles: int) -> Tensor:
    start, end, line = MARKS
    return torch.tensor([start, *[*[tiny.IMAGE] * TOKENS, line] * tiles, end])


tiny.BUILDERS |= {
    "Cohere2VisionForConditionalGeneration": tiny_cohere2_vision,
    "Cohere2VisionModel": lambda: tiny_cohere2_vision().model,
}
tiny.SHAPES["cohere2_vision"] = [((2,),), ((1,), (2,)), ((1,),)]
tiny.PICTURES["cohere2_vision"] = _pictures
tiny.TILE["cohere2_vision"] = (1,)
