"""LLaVA with a bridge of `jeton.bridge`: fewer tokens than patches, made by a module that mixes them."""

from __future__ import annotations

from torch import nn

from ..layout import Geometry
from .base import Inputs, adapter
from .llava import Llava


@adapter("BridgedLlava", "BridgedLlavaModel")
class Bridged(Llava):
    mixes = True

    def check(self) -> None:
        if not self.bridge.whole:
            super().check()

    @property
    def bridge(self) -> nn.Module:
        return self.base.multi_modal_projector

    @property
    def projector(self) -> None:  # type: ignore[override]
        return None

    @property
    def feature_block(self) -> int:
        """That of the features handed on; others that a bridge reads stand behind it."""
        layer = self.model.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[0]
        return layer - 1 if layer >= 0 else len(self.encoder.blocks) + layer

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        return [self.bridge.geometry()] * (inputs["pixel_values"].shape[0] // self.bridge.pictures)

    def between(self, length: int) -> float:
        return self.bridge.flops(length)
