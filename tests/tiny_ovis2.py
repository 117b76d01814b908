"""A tiny Ovis2, and prompts as its processor writes them: tiles with indicator tokens around and between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny

GRID, COL, ROW = 7, 8, 9
SIDE, TOKENS = 6, 9  # 6 x 6 patches make 3 x 3 tokens


def tiny_ovis2() -> nn.Module:
    vision = tiny.vision(image_size=SIDE * tiny.PATCH)
    config = transformers.Ovis2Config(
        vision_config=transformers.Ovis2VisionConfig(**vision, vocab_size=40, hidden_stride=2),
        text_config=transformers.Qwen2Config(**tiny._text(), max_position_embeddings=1024),
        image_token_id=tiny.IMAGE,
        visual_indicator_token_ids=[tiny.START, GRID, COL, ROW, tiny.END],
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return tiny.ready(transformers.Ovis2ForConditionalGeneration(config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Images are (rows, columns) of crops, (1, 1) for one that is not cut."""
    tiles = [1 if rows * cols == 1 else 1 + rows * cols for rows, cols in images]
    pixels = torch.randn(sum(tiles), 3, SIDE * tiny.PATCH, SIDE * tiny.PATCH, generator=generator)
    return {"pixel_values": pixels}, [count * TOKENS for count in tiles], [written(*grid) for grid in images]


def written(rows: int, cols: int) -> Tensor:
    tile = [tiny.IMAGE] * TOKENS
    row = [*tile, COL] * (cols - 1) + tile
    crops = [*row, ROW] * (rows - 1) + row if rows * cols > 1 else []
    return torch.tensor([tiny.START, *tile, GRID, *crops, tiny.END])


tiny.BUILDERS |= {
    "Ovis2ForConditionalGeneration": tiny_ovis2,
    "Ovis2Model": lambda: tiny_ovis2().model,
}
tiny.SHAPES["ovis2"] = [((2, 2),), ((1, 1), (1, 2)), ((2, 1),)]
tiny.PICTURES["ovis2"] = pictures
tiny.TILE["ovis2"] = (1, 1)
