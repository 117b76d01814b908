"""A tiny ViT-MSN."""

from __future__ import annotations

import transformers
from torch import nn

import tiny


def tiny_vit_msn() -> nn.Module:
    return tiny.ready(transformers.ViTMSNModel(transformers.ViTMSNConfig(**tiny.vision())))


tiny.BUILDERS |= {"ViTMSNModel": tiny_vit_msn}
