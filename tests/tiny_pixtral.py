"""Tiny models with Pixtral's tower, and prompts for them: a break token behind each row of a picture, another behind the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

import tiny

BREAK = 7


def _tower() -> transformers.PixtralVisionConfig:
    return transformers.PixtralVisionConfig(**tiny.vision(image_size=64))


def tiny_pixtral() -> nn.Module:
    return tiny.ready(transformers.PixtralVisionModel(_tower()))


def tiny_mistral3() -> nn.Module:
    """Mistral 3: 2x2 patches make a token."""
    config = transformers.Mistral3Config(
        vision_config=_tower(),
        text_config=transformers.MistralConfig(**tiny._text(), max_position_embeddings=1024, sliding_window=None),
        image_token_index=tiny.IMAGE,
        tie_word_embeddings=False,
    )
    return tiny.ready(transformers.Mistral3ForConditionalGeneration(config))


def tiny_llava_pixtral() -> nn.Module:
    """LLaVA with Pixtral's tower: each patch is a token."""
    config = transformers.LlavaConfig(
        vision_config=_tower(),
        text_config=transformers.MistralConfig(**tiny._text(), max_position_embeddings=1024, sliding_window=None),
        image_token_id=tiny.IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    return tiny.ready(transformers.LlavaForConditionalGeneration(config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Sizes are (height, width) in pixels. A grid that is odd loses a row or column of patches in Mistral 3's merger."""
    height, width = (max(sizes) for sizes in zip(*images, strict=True))
    pixels = torch.zeros(len(images), 3, height, width)
    for number, (tall, wide) in enumerate(images):
        pixels[number, :, :tall, :wide] = torch.randn(3, tall, wide, generator=generator)
    side = tiny.PATCH * getattr(net.config, "spatial_merge_size", 1)
    grids = [(tall // side, wide // side) for tall, wide in images]
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(images)}
    return inputs, [rows * cols for rows, cols in grids], [written(*grid) for grid in grids]


def written(rows: int, cols: int) -> Tensor:
    lines = torch.full((rows, cols + 1), tiny.IMAGE)
    lines[:, -1] = BREAK
    lines[-1, -1] = tiny.END
    return lines.flatten()


tiny.BUILDERS |= {
    "PixtralVisionModel": tiny_pixtral,
    "Mistral3ForConditionalGeneration": tiny_mistral3,
    "Mistral3Model": lambda: tiny_mistral3().model,
    "LlavaForConditionalGeneration-pixtral": tiny_llava_pixtral,
}
tiny.SHAPES["pixtral"] = [((32, 48),), ((24, 24), (36, 16)), ((28, 40),)]
tiny.PICTURES["pixtral"] = pictures
