"""ViT-MAE encoders as feature extractors: all patches shown, in the order of the picture."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..method import Unsupported
from .registry import adapter
from .vit import ViT


@adapter("ViTMAEModel")
class VitMae(ViT):
    """The model sorts patches by random `noise`, also where it hides none. Under jeton the noise ascends, so that the tokens
    stand row by row as the geometry says. To the blocks order means nothing: the features are the same, only listed in order."""

    example: ClassVar = {"mask_ratio": 0.0}
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    def check(self, top: nn.Module) -> None:
        if hasattr(top, "decoder"):
            raise Unsupported(
                f"{type(top).__name__} paints every patch again behind its encoder, which needs all of them; use its encoder, "
                f"model.vit."
            )
        ratio = self.model.config.mask_ratio
        if ratio:
            raise Unsupported(
                f"{self.name} hides {ratio:.0%} of the patches at random (mask_ratio={ratio}), so which tokens it has is not "
                f"known; set model.config.mask_ratio = 0 to read features of whole pictures."
            )

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        noise, pixels = inputs.get("noise"), inputs["pixel_values"]
        if noise is not None and not bool((noise.diff(dim=1) > 0).all()):
            raise ValueError(
                f"the noise given to {self.name} sorts the patches, and then they no longer stand where jeton looks for them; "
                f"leave it out, or let it ascend."
            )
        height, width = self.grid(pixels)
        ascending = torch.arange(height * width, device=pixels.device, dtype=torch.float32)
        return {**inputs, "noise": ascending.expand(pixels.shape[0], -1)}
