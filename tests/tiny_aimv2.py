"""A tiny AIMv2 for native resolution."""

from __future__ import annotations

import transformers
from torch import nn

import tiny


def tiny_aimv2() -> nn.Module:
    return tiny.ready(transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**tiny.vision(is_native=True))))


tiny.BUILDERS |= {"Aimv2VisionModel": tiny_aimv2}
