"""timm's `VisionTransformer`: any mix of class token, registers, layer scale, stochastic depth and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..method import Unsupported
from .base import Encoder, Parts
from .registry import adapter


@adapter("VisionTransformer", "VisionTransformerDistilled")
class TimmVit(Encoder):
    """It is used by `model(x)` as well as by `model.forward_features(x)`: tokens come in at the patch embedding and go out at the
    last norm, and the head sees what is left. Its attention calls torch's own function and is heard there."""

    home = "timm.models"
    functional = True
    argument = "x"
    fixed = ("was made for pictures of one size", "dynamic_img_size=True when the model is made, or pool")

    def check(self, top: nn.Module) -> None:
        model = self.model
        if not hasattr(model, "patch_embed"):
            raise Unsupported(f"{type(model).__module__}.{self.name} is not timm's; jeton reads timm.models.vision_transformer.")
        names = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
        for block in self.blocks:
            if any(not hasattr(block, name) for name in names):
                raise Unsupported(
                    f"{self.name} has blocks of its own kind ({type(block).__name__}), whose halves jeton cannot tell apart; "
                    f"it reads timm's Block."
                )
        if model.training and getattr(model.patch_drop, "prob", 0):
            raise Unsupported(f"{self.name} drops patches at random while it trains; make it with patch_drop_rate=0.")

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return self.model.num_prefix_tokens

    @property
    def has_class(self) -> bool:  # type: ignore[override]
        return self.model.cls_token is not None

    @property
    def resizable(self) -> bool:  # type: ignore[override]
        return self.model.dynamic_img_size

    @property
    def pixel_mean(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._processed("mean", IMAGENET_DEFAULT_MEAN)

    @property
    def pixel_std(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._processed("std", IMAGENET_DEFAULT_STD)

    def _processed(self, name: str, otherwise: Sequence[float]) -> tuple[float, ...]:
        """From the configuration of the weights, or as timm has it where there is none."""
        told = getattr(self.model, "pretrained_cfg", None) or {}
        return tuple(told.get(name, otherwise))

    @property
    def entrance(self) -> nn.Module:
        return self.model.patch_embed

    @property
    def exit(self) -> nn.Module:
        return self.model.norm

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(
            block.norm1, block.attn, block.norm2, block.mlp,
            scale1=block.ls1, scale2=block.ls2, drop1=block.drop_path1, drop2=block.drop_path2,
            residual_first=True,
        )  # fmt: skip

    @property
    def patch_size(self) -> int:
        size = self.model.patch_embed.feat_ratio()
        return size if isinstance(size, int) else size[0]

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        return tuple(self.model.patch_embed.dynamic_feat_size(pixels.shape[-2:]))  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        return self.blocks[0].attn.num_heads  # type: ignore[union-attr, return-value]

    @property
    def usual_patches(self) -> int:
        return self.model.patch_embed.num_patches

    @property
    def checkpointing(self) -> bool:
        return self.model.grad_checkpointing and torch.is_grad_enabled()

    @property
    def probe(self) -> nn.Module | None:
        return self.model.attn_pool

    @property
    def pools_special(self) -> bool:  # type: ignore[override]
        return self.model.pool_include_prefix

    def averaged(self, top: nn.Module) -> nn.Module | None:
        model = self.model
        return model.fc_norm if model.attn_pool is None and model.global_pool in ("avg", "avgmax", "max") else None

    def pooled(self, features: Tensor, weight: Tensor) -> Tensor:
        mean, most = super().pooled(features, weight), features.masked_fill(weight[..., None] == 0, -torch.inf).amax(1)
        return {"avg": mean, "max": most, "avgmax": 0.5 * (mean + most)}[self.model.global_pool]

    @property
    def width(self) -> int:
        return self.model.embed_dim

    @property
    def mlp_width(self) -> int:
        return self.blocks[0].mlp.fc2.in_features  # type: ignore[union-attr, return-value]

    @property
    def gated_mlp(self) -> bool:  # type: ignore[override]
        return type(self.blocks[0].mlp).__name__ in ("GluMlp", "SwiGLU")
