"""Tiny encoders: DINOv3, ViT-MAE, BEiT, I-JEPA, VideoMAE, SAM and timm's VisionTransformer, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import tiny
import with_timm

STEPS = 2  # a video has so many steps of two frames


def tiny_dinov3(**more: Any) -> nn.Module:
    config = transformers.DINOv3ViTConfig(**tiny.vision(num_register_tokens=2, **more))
    return tiny.ready(transformers.DINOv3ViTModel(config))


def tiny_vit_mae() -> nn.Module:
    return tiny.ready(transformers.ViTMAEModel(transformers.ViTMAEConfig(**tiny.vision(mask_ratio=0.0))))


def tiny_beit(**more: Any) -> nn.Module:
    """With a bias of its own in each block, as the published ones have it."""
    config = transformers.BeitConfig(**tiny.vision(**{"use_relative_position_bias": True, "layer_scale_init_value": 0.5, **more}))
    return tiny.ready(transformers.BeitModel(config))


def tiny_ijepa() -> nn.Module:
    return tiny.ready(transformers.IJepaModel(transformers.IJepaConfig(**tiny.vision())))


def tiny_videomae() -> nn.Module:
    """Two steps of 4 x 4 tokens, each 2 frames of 4 x 4 pixels."""
    sizes = tiny.vision(image_size=4 * tiny.PATCH, num_frames=2 * STEPS, tubelet_size=2, use_mean_pooling=False)
    return tiny.ready(transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes)))


def tiny_timm(cls: str = "VisionTransformer", **more: Any) -> nn.Module:
    """timm's, with registers; it hands on its tokens, not a class."""
    with_timm.timm()
    from timm.models import deit, vision_transformer

    sizes = {
        "embed_dim": 32,
        "depth": 5,
        "num_heads": 4,
        "mlp_ratio": 1.5,
        "img_size": tiny.SIDE * tiny.PATCH,
        "patch_size": tiny.PATCH,
    }
    own = {"num_classes": 0, "global_pool": "", "init_values": 0.5, "reg_tokens": 2, "qk_norm": True, "dynamic_img_size": True}
    if cls == "VisionTransformerDistilled":
        return tiny.ready(deit.VisionTransformerDistilled(**sizes, num_classes=0, **more))
    return tiny.ready(vision_transformer.VisionTransformer(**{**sizes, **own, **more}))


def tiny_sam(side: int = tiny.SIDE, window: int = 3, **more: Any) -> nn.Module:
    """Windows of 3 x 3 patches, smaller at two borders, around one block that sees all of them."""
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    sizes = tiny.vision(image_size=side * tiny.PATCH, mlp_dim=48, output_channels=16, window_size=window)
    del sizes["intermediate_size"]
    config = transformers.SamVisionConfig(**sizes, global_attn_indexes=[2], use_rel_pos=True, **more)
    return tiny.ready(SamVisionEncoder(config))


def videos(net: nn.Module, batch: int, generator: torch.Generator) -> tiny.Inputs:
    return {"pixel_values": torch.randn(batch, 2 * STEPS, 3, 4 * tiny.PATCH, 4 * tiny.PATCH, generator=generator)}


def in_order(net: nn.Module, batch: int, generator: torch.Generator) -> tiny.Inputs:
    """With the noise that leaves ViT-MAE's patches in order, so that the model alone has the order that jeton gives it."""
    noise = torch.arange(float(tiny.SIDE**2)).expand(batch, -1)
    return {"pixel_values": torch.randn(batch, 3, *[tiny.SIDE * tiny.PATCH] * 2, generator=generator), "noise": noise}


def named_x(net: nn.Module, batch: int, generator: torch.Generator) -> tiny.Inputs:
    return {"x": torch.randn(batch, 3, *[tiny.SIDE * tiny.PATCH] * 2, generator=generator)}


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "DINOv3ViTModel": tiny_dinov3,
    "ViTMAEModel": tiny_vit_mae,
    "BeitModel": tiny_beit,
    "IJepaModel": tiny_ijepa,
    "VideoMAEModel": tiny_videomae,
    "SamVisionEncoder": tiny_sam,
}
if with_timm.has_timm():
    BUILDERS["VisionTransformer"] = tiny_timm
    BUILDERS["VisionTransformerDistilled"] = lambda: tiny_timm("VisionTransformerDistilled")
tiny.BUILDERS |= BUILDERS
tiny.ALONE |= {"videomae": videos, "vit_mae": in_order}
tiny.ALONE |= {"VisionTransformer": named_x, "VisionTransformerDistilled": named_x}
