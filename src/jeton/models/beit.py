"""BEiT encoders: a bias for every pair of relative positions, and a head that averages patches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .base import Parts
from .registry import adapter
from .vit import ViT


@adapter("BeitModel")
class Beit(ViT):
    """The bias is made for the whole picture, in each block or once for all, and handed on as part of the mask; the engine takes
    the rows and columns of the tokens that are left. A merged token has the position of the one that represents it."""

    def parts(self, block: nn.Module) -> Parts:
        return Parts(
            block.layernorm_before,
            block.attention,
            block.layernorm_after,
            block.mlp,
            scale1=partial(_scaled, block, "lambda_1"),
            scale2=partial(_scaled, block, "lambda_2"),
            drop1=block.drop_path,
            drop2=block.drop_path,
        )

    def handed(self, block: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = dict(kwargs)
        height, width = kwargs.pop("resolution")
        kwargs.pop("interpolate_pos_encoding", None)  # stretches the bias to the tokens there are: all of them, here
        relative = block.relative_position_bias
        if relative is not None:
            side = self.patch_size
            bias = relative((height // side, width // side))
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = bias if mask is None else bias + mask
        return kwargs

    def averaged(self, top: nn.Module) -> nn.Module | None:
        pooler = self.model.pooler
        return None if pooler is None else pooler.layernorm


def _scaled(block: nn.Module, name: str, x: Tensor) -> Tensor:
    scaled: Tensor = getattr(block, name) * block.dropout(x)
    return scaled
