"""PaliGemma: all of the prompt sees all of it, text before images too; only what is answered looks back.

Version 2 has Gemma 2 for its language model: a window in every other layer, from which the prompt is excepted, and attention
whose logits are bent. Positions begin at 1.
"""

from __future__ import annotations

from torch import nn

from .llava import Llava
from .registry import adapter


@adapter("PaliGemmaForConditionalGeneration", "PaliGemmaModel")
class PaliGemma(Llava):
    masked_above = True
    needed = ("token_type_ids",)

    def softcap(self, layer: nn.Module) -> float | None:
        return getattr(self.attention(layer), "attn_logit_softcapping", None)
