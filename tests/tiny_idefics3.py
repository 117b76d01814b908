"""Tiny Idefics3 and SmolVLM, and prompts for them as their processors write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

import tiny

MARK, NAME, LINE = 7, 8, 9
TILE = 6 * tiny.PATCH  # 6 x 6 patches make 3 x 3 tokens


def _config() -> dict:
    return {
        "vision_config": tiny.vision(image_size=TILE),
        "text_config": transformers.LlamaConfig(**tiny._text(), max_position_embeddings=1024, pad_token_id=tiny.PAD),
        "image_token_id": tiny.IMAGE,
        "scale_factor": 2,
    }


def tiny_idefics3() -> nn.Module:
    return tiny.ready(transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**_config())))


def tiny_smolvlm() -> nn.Module:
    return tiny.ready(transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(**_config())))


def tiny_idefics3_tower() -> nn.Module:
    return tiny.ready(Idefics3VisionTransformer(tiny_idefics3().config.vision_config))


def tiny_smolvlm_tower() -> nn.Module:
    return tiny.ready(SmolVLMVisionTransformer(tiny_smolvlm().config.vision_config))


def pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[Tensor]]:
    """Images are (rows, columns) of tiles, (0, 0) for one that is not cut; frames of a video are such."""
    tiles = sum(rows * cols + 1 for rows, cols in images)
    pixels = torch.randn(1, tiles, 3, TILE, TILE, generator=generator)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, tiles, TILE, TILE, dtype=torch.long)}
    return inputs, [(rows * cols + 1) * 9 for rows, cols in images], [_written(*grid) for grid in images]


def _written(rows: int, cols: int) -> Tensor:
    tile = [MARK, NAME, *[tiny.IMAGE] * 9]
    lines = (tile * cols + [LINE]) * rows
    return torch.tensor(lines + [LINE] * (rows > 0) + tile + [MARK])


tiny.BUILDERS |= {
    "Idefics3VisionTransformer": tiny_idefics3_tower,
    "SmolVLMVisionTransformer": tiny_smolvlm_tower,
    "Idefics3ForConditionalGeneration": tiny_idefics3,
    "Idefics3Model": lambda: tiny_idefics3().model,
    "SmolVLMForConditionalGeneration": tiny_smolvlm,
    "SmolVLMModel": lambda: tiny_smolvlm().model,
}
tiny.SHAPES |= {"idefics3": [((2, 2),), ((2, 1), (0, 0)), ((1, 2),)], "smolvlm": [((1, 3),), ((2, 1), (0, 0)), ((0, 0), (0, 0))]}
tiny.PICTURES |= {"idefics3": pictures, "smolvlm": pictures}
