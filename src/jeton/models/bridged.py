"""LLaVA and LLaVA-NeXT with a bridge of `jeton.bridge`: fewer tokens than patches, made by a module that mixes them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import nn

from ..layout import Album, Geometry
from .base import Inputs
from .llava import Llava
from .llava_next import any_resolution
from .registry import adapter


@adapter("BridgedLlava", "BridgedLlavaModel")
class Bridged(Llava):
    mixes = True
    example: ClassVar = {"bridge": {"id": "m3", "tokens": 144}}

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

    def between(self, length: int, album: Album) -> float:
        return len(album) * float(self.bridge.flops(length))


@adapter("BridgedLlavaNext", "BridgedLlavaNextModel")
class BridgedNext(Bridged):
    """The bridge's grid of every crop is stitched and cut as patches are."""

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        made_of = self.bridge.geometry()
        return [self._stitched(height, width, made_of) for height, width in inputs["image_sizes"].tolist()]

    def _stitched(self, height: int, width: int, made_of: Geometry) -> Geometry:
        config, k = self.model.config, len(made_of)
        pinpoints = tuple(tuple(point) for point in config.image_grid_pinpoints)
        whole = any_resolution(height, width, pinpoints, config.vision_config.image_size, int(made_of.height[0]))
        token = whole.source[:, 0]
        patches = token[:, None] // k * made_of.patches + made_of.source[token % k]
        return replace(whole, source=patches.masked_fill(token[:, None] < 0, -1), patches=len(whole.kinds) * made_of.patches)

    def between(self, length: int, album: Album) -> float:
        return sum(len(item.kinds) for item in album.geometry) * float(self.bridge.flops(length))
