"""Tiny PaliGemma, with Gemma and with Gemma 2, and Gemma 3, whose windows are shorter than the prompts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import tiny
import tiny_llava

WINDOW = 60  # longer than an image, shorter than the longest prompts


def _text(**more: Any) -> dict[str, Any]:
    return {**tiny._text(), "head_dim": 16, "max_position_embeddings": 1024, "pad_token_id": tiny.PAD, **more}


@torch.no_grad()
def _ready(model: nn.Module) -> nn.Module:
    """Gemma's norms multiply by one and their weight."""
    tiny.ready(model)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight -= 1
    return model


def tiny_paligemma(second: bool = False, window: int = WINDOW) -> nn.Module:
    """Version 2 slides every other layer and bends logits at 5, not at 50 as the published ones, so that it matters."""
    text = transformers.GemmaConfig(**_text())
    if second:
        text = transformers.Gemma2Config(**_text(sliding_window=window, query_pre_attn_scalar=16, attn_logit_softcapping=5.0))
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny.vision(vision_use_head=False), projection_dim=64).to_dict(),
        text_config=text.to_dict(),
        image_token_id=tiny.IMAGE,
        projection_dim=64,
    )
    return _ready(transformers.PaliGemmaForConditionalGeneration(config))


def tiny_gemma3(side: int = 12, tokens: int = 36, window: int = WINDOW) -> nn.Module:
    """12 x 12 patches, 2 x 2 of which make a token; every other layer slides."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = transformers.Gemma3TextConfig(**_text(sliding_window=window, query_pre_attn_scalar=16, layer_types=kinds))
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **tiny.vision(vision_use_head=False, image_size=side * tiny.PATCH)
        ).to_dict(),
        text_config=text.to_dict(),
        mm_tokens_per_image=tokens,
        image_token_id=tiny.IMAGE,
        boi_token_index=tiny.START,
        eoi_token_index=tiny.END,
    )
    return _ready(transformers.Gemma3ForConditionalGeneration(config))


def _pictures(net: nn.Module, images: Any, generator: torch.Generator) -> tuple[tiny.Inputs, list[int], list[int]]:
    size = net.config.vision_config.image_size
    pixels = torch.randn(len(images), 3, size, size, generator=generator)
    count = net.config.mm_tokens_per_image if net.config.model_type == "gemma3" else tiny.SIDE**2
    return {"pixel_values": pixels}, [count] * len(images), [tiny.IMAGE] * len(images)


tiny.BUILDERS |= {
    "PaliGemmaForConditionalGeneration": tiny_paligemma,
    "PaliGemmaForConditionalGeneration-2": lambda: tiny_paligemma(second=True),
    "PaliGemmaModel": lambda: tiny_paligemma().model,
    "Gemma3ForConditionalGeneration": tiny_gemma3,
    "Gemma3Model": lambda: tiny_gemma3().model,
}
for _family in ("paligemma", "gemma3"):
    tiny.SHAPES[_family] = tiny_llava.SQUARE
    tiny.PICTURES[_family] = _pictures
tiny.FIRST["paligemma"] = 1
tiny.TYPES |= {"paligemma": torch.zeros_like, "gemma3": lambda ids: (ids == tiny.IMAGE).long()}
