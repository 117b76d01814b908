"""LLaVA-1.5: one picture an image, a per-token projector. Its tower may be any encoder jeton knows, Pixtral's too."""

from __future__ import annotations

from torch import nn

from ..layout import Geometry
from ..method import Unsupported
from .base import Encoder, Inputs, VisionLanguage
from .pixtral import BREAKS, Pixtral
from .registry import adapter, encoder_in


@adapter("LlavaForConditionalGeneration", "LlavaModel")
class Llava(VisionLanguage):
    @property
    def projector(self) -> nn.Module:  # type: ignore[override]
        return self.base.multi_modal_projector

    @property
    def marks(self) -> str:  # type: ignore[override]
        return BREAKS if isinstance(self.encoder, Pixtral) else ""

    def check(self) -> None:
        if self.encoder.prefix and getattr(self.model.config, "vision_feature_select_strategy", "default") == "full":
            raise Unsupported(
                f'{self.name} hands its class token on (vision_feature_select_strategy="full"); jeton reads the default strategy.'
            )

    def vision(self) -> Encoder:
        return encoder_in(self.base.vision_tower)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        return self.encoder.geometry(inputs)
