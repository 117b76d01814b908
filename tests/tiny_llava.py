"""Tiny LLaVAs of every kind, bridged ones too, and prompts with single pictures, crops or frames. `tiny` is imported first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import nn

import tiny
from jeton.bridge import attach

SQUARE: list[tuple[tuple[int, ...], ...]] = [((),), ((), ()), ((),)]  # what three prompts show where pictures have one size


def tiny_llava(siglip: bool = False, side: int = tiny.SIDE) -> nn.Module:
    """LLaVA-1.5; with a SigLIP encoder it has no class token and hands on the last block's output, all of it."""
    tower = transformers.SiglipVisionConfig if siglip else transformers.CLIPVisionConfig
    config = transformers.LlavaConfig(
        vision_config=tower(**tiny.vision(image_size=side * tiny.PATCH)),
        text_config=transformers.LlamaConfig(**tiny._text(), max_position_embeddings=1024),
        image_token_id=tiny.IMAGE,
        image_seq_length=side**2,
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return tiny.ready(transformers.LlavaForConditionalGeneration(config))


def tiny_bridged() -> nn.Module:
    """LLaVA whose 14 x 14 patches are pooled to tiny.SIDE x tiny.SIDE tokens behind the projector."""
    return attach(tiny_llava(side=2 * tiny.SIDE), "m3", tokens=tiny.SIDE**2)


def tiny_llava_next() -> nn.Module:
    """LLaVA-NeXT: crops of 6 x 6 patches, up to 2 x 2 or 1 x 3 of them."""
    side = 24
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny.vision(image_size=side)),
        text_config=transformers.Qwen2Config(**tiny._text(), max_position_embeddings=1024),
        image_token_id=tiny.IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [side, 3 * side]],
        vision_feature_layer=-2,
    )
    return tiny.ready(transformers.LlavaNextForConditionalGeneration(config))


def tiny_bridged_next() -> nn.Module:
    """LLaVA-NeXT whose crops' 6 x 6 patches are pooled to 3 x 3 tokens behind the projector."""
    return attach(tiny_llava_next(), "m3", tokens=9)


def tiny_llava_next_video() -> nn.Module:
    """LLaVA-NeXT-Video: frames of 6 x 6 patches pooled to 3 x 3."""
    side = 24
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny.vision(image_size=side)),
        text_config=transformers.Qwen2Config(**tiny._text(), max_position_embeddings=1024),
        image_token_index=tiny.IMAGE,
        video_token_index=tiny.VIDEO,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        vision_feature_layer=-2,
    )
    return tiny.ready(transformers.LlavaNextVideoForConditionalGeneration(config))


def tiny_llava_onevision() -> nn.Module:
    """LLaVA-OneVision: tiles of 5 x 5 patches; more than two tiles' worth are resized; frames are pooled to 3 x 3."""
    side = 20
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny.vision(image_size=side, vision_use_head=False)),
        text_config=transformers.Qwen2Config(**tiny._text(), max_position_embeddings=1024),
        image_token_index=tiny.IMAGE,
        video_token_index=tiny.VIDEO,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side]],
        vision_aspect_ratio="anyres_max_2",
    )
    return tiny.ready(transformers.LlavaOnevisionForConditionalGeneration(config))


def _llava_pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[int]]:
    config = net.config.vision_config
    pixels = torch.randn(len(images), 3, config.image_size, config.image_size, generator=generator)
    return {"pixel_values": pixels}, [net.config.image_seq_length] * len(images), [tiny.IMAGE] * len(images)


def _next_pictures(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[int]]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = net.config.vision_config.image_size
    crops = [image_size_to_num_patches(size, net.config.image_grid_pinpoints, side) for size in images]
    pixels = torch.zeros(len(images), max(crops), 3, side, side)
    for image, count in enumerate(crops):
        pixels[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(images)}
    base = getattr(net, "model", net)
    with torch.no_grad():
        dtype = next(net.parameters()).dtype
        features = base.get_image_features(pixels.to(dtype), inputs["image_sizes"]).pooler_output
    return inputs, [len(feature) for feature in features], [tiny.IMAGE] * len(images)


def _crops_or_frames(
    net: nn.Module, images: Sequence[tuple[int, ...]], generator: torch.Generator
) -> tuple[tiny.Inputs, list[int], list[int]]:
    """Any-resolution images, or one video, of LLaVA-NeXT-Video and LLaVA-OneVision; the latter cuts only single images."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    side, single = net.config.vision_config.image_size, net.config.model_type == "llava_onevision"
    base, dtype = getattr(net, "model", net), next(net.parameters()).dtype
    if len(images[0]) == 1:
        frames = torch.randn(1, images[0][0], 3, side, side, generator=generator)
        with torch.no_grad():
            (features,) = tiny.encoded(base, "video", {"pixel_values_videos": frames.to(dtype)})
        return {"pixel_values_videos": frames, **_told(single, 0)}, [len(features)], [tiny.VIDEO]
    crops = [image_size_to_num_patches(size, net.config.image_grid_pinpoints, side) for size in images]
    if single and len(images) > 1:
        crops = [1] * len(images)
    pixels = torch.zeros(len(images), max(crops), 3, side, side)
    for image, count in enumerate(crops):
        pixels[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(images), **_told(single, len(images))}
    with torch.no_grad():
        features = base.get_image_features(**{**inputs, "pixel_values": pixels.to(dtype)}).pooler_output
    return inputs, [len(feature) for feature in features], [tiny.IMAGE] * len(images)


def _told(single: bool, images: int) -> tiny.Inputs:
    """LLaVA-OneVision is told how many images each prompt has."""
    return {"batch_num_images": torch.tensor([images])} if single else {}


tiny.BUILDERS |= {
    "LlavaForConditionalGeneration": tiny_llava,
    "BridgedLlava": tiny_bridged,
    "BridgedLlavaNext": tiny_bridged_next,
    "LlavaForConditionalGeneration-siglip": lambda: tiny_llava(siglip=True),
    "LlavaModel": lambda: tiny_llava().model,
    "BridgedLlavaModel": lambda: tiny_bridged().model,
    "BridgedLlavaNextModel": lambda: tiny_bridged_next().model,
    "LlavaNextForConditionalGeneration": tiny_llava_next,
    "LlavaNextModel": lambda: tiny_llava_next().model,
    "LlavaNextVideoForConditionalGeneration": tiny_llava_next_video,
    "LlavaNextVideoModel": lambda: tiny_llava_next_video().model,
    "LlavaOnevisionForConditionalGeneration": tiny_llava_onevision,
    "LlavaOnevisionModel": lambda: tiny_llava_onevision().model,
}
tiny.SHAPES |= {
    "llava": SQUARE,
    "llava_next": [((40, 46),), ((20, 47), (48, 25)), ((16, 70),)],
    "llava_next_video": [((20, 47),), ((40, 46), (48, 25)), ((2,),)],
    "llava_onevision": [((36, 40),), ((20, 36), (36, 20)), ((2,),)],
}
tiny.PICTURES |= {
    "llava": _llava_pictures,
    "llava_next": _next_pictures,
    "llava_next_video": _crops_or_frames,
    "llava_onevision": _crops_or_frames,
}
