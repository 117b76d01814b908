"""CLIP's text tower as the companion of an encoder that came from the same CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClipText:
    """Compares patches of a CLIP encoder with questions, in CLIP's joint space.

    clip: a `CLIPModel` on the device of the model it helps; its own vision tower is not run. tokenizer: its tokenizer. A
    model's encoder must have come from this CLIP and stayed frozen: the joint space of another one means nothing to it.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        parts = ("text_model", "text_projection", "visual_projection", "vision_model")
        missing = [name for name in parts if not hasattr(clip, name)]
        if missing:
            raise TypeError(f"ClipText takes a whole CLIPModel; {type(clip).__name__} has no {', '.join(missing)}.")
        self.clip, self.tokenizer = clip, tokenizer
        self.width: int = clip.visual_projection.in_features  # type: ignore[union-attr, assignment]
        self._known: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def features(self, questions: tuple[str, ...], end: str = "eos") -> Tensor:
        """(Q, P) unit vectors in the joint space. Questions are cut to what CLIP can read. `end` "last" takes the text's feature
        at the last place of the padding instead of at its end."""
        if self._known is None or self._known[0] != (questions, end):
            most = self.clip.config.text_config.max_position_embeddings  # type: ignore[union-attr]
            words = self.tokenizer(list(questions), padding="max_length", truncation=True, max_length=most, return_tensors="pt")
            device = self.clip.text_projection.weight.device  # type: ignore[union-attr]
            read = self.clip.text_model(words["input_ids"].to(device), attention_mask=words["attention_mask"].to(device))  # type: ignore[operator]
            pooled = read.pooler_output if end == "eos" else read.last_hidden_state[:, -1]
            self._known = (questions, end), F.normalize(self.clip.text_projection(pooled).float(), dim=-1)  # type: ignore[operator]
        return self._known[1]

    def similarity(self, patches: Tensor, questions: tuple[str, ...], end: str = "eos", normed: bool = True) -> Tensor:
        """(..., Q) float32 cosine of patches (..., width) and questions, divided by the square root of the joint width."""
        clip = self.clip
        x = patches.to(clip.visual_projection.weight)  # type: ignore[arg-type, union-attr]
        x = clip.visual_projection(clip.vision_model.post_layernorm(x) if normed else x)  # type: ignore[operator, union-attr]
        text = self.features(questions, end)
        return F.normalize(x.float(), dim=-1) @ text.mT / text.shape[-1] ** 0.5
