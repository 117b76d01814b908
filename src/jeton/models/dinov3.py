"""DINOv3 encoders: a class token, registers, and rotary positions of the patches instead of learned ones."""

from __future__ import annotations

from torch import nn

from .registry import adapter
from .vit import LayerScaled


@adapter("DINOv3ViTModel")
class Dinov3(LayerScaled):
    """Every block is handed the cosines and sines of all patches; the engine takes those of the tokens that are left. A merged
    token is turned as the one that represents it."""

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return 1 + self.model.config.num_register_tokens

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.model.layer)

    @property
    def gated_mlp(self) -> bool:  # type: ignore[override]
        return self.model.config.use_gated_mlp
