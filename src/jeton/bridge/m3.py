"""M3, Matryoshka Multimodal Models: visual tokens pooled after the projector; one model answers at every length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..ops.squares import pool, window_of
from ..registry import register
from ._common import Bridge, Projector, linear_flops
from ._model import BridgedLlava, BridgedLlavaNext, shorten


@register(
    title="Matryoshka Multimodal Models",
    year=2024,
    source="arXiv:2405.17430",
    family="bridge",
    stage="projector",
    training_free=False,
    headline="about 9 tokens suffice for COCO-style benchmarks; the accuracy of 576 is kept",
)
class M3(Bridge):
    """Project all N features, then average T-th parts of the grid: windows of ``sqrt(N / T)`` squared, so each token of a short
    set is the mean of tokens of every longer one. No new parameters; T = N is the model as it was.

    `loss` trains all lengths at once: for every sample the mean over scales of the answers' cross-entropy (the paper trains
    encoder-projected LLaVA-1.5 at 576, 144, 36, 9 and 1). At inference the length is chosen: `scale(36)`, then `jeton.bridge.fit`
    for a processor with as many placeholders; `tokens` is what the saved model starts with, None for all. N / T must be a square
    number. In LLaVA-NeXT every crop is pooled to T tokens, and what is left is stitched, cut to the picture and given newlines.
    """

    def __init__(self, config: Any, tokens: int | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.projector = Projector(config, self.width)
        self._tokens = self.patches
        self.scale(tokens)

    @property
    def tokens(self) -> int:
        return self._tokens

    def scale(self, tokens: int | None) -> None:
        """Answer with so many tokens an image from now on; None for all."""
        self._tokens = self.patches if tokens is None else tokens
        window_of(self._tokens, self.patches)
        self.config.bridge = {**self.config.bridge, "tokens": tokens}
        self.config.image_seq_length = self._tokens

    def forward(self, features: Tensor) -> Tensor:
        return pool(self.projector(features), self._tokens)

    def flops(self, length: int) -> float:
        return self.patches * linear_flops(self.projector)


def loss(
    model: BridgedLlava | BridgedLlavaNext,
    inputs: Mapping[str, Any],
    scales: Sequence[int],
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """The model's loss at every scale, for `jeton.train` to add: their mean, as published, or weighted by `weights`, which are
    divided by their sum. `inputs` (with labels) have as many placeholders as the model's own scale; pictures are encoded once."""
    weights = [1.0] * len(scales) if weights is None else weights
    if len(weights) != len(scales) or min(weights) < 0 or not sum(weights):
        raise ValueError(f"weights must list a share for each of {len(scales)} scales, got {weights!r}.")
    rest = dict(inputs)
    own = model.bridge.tokens
    image_id = model.config.image_token_id
    sizes = {name: rest.pop(name) for name in ("image_sizes",) if name in rest}
    encoded = model.model.get_image_features(rest.pop("pixel_values"), **sizes, return_dict=True)
    found = {}
    for tokens, weight in zip(scales, weights, strict=True):
        if sizes:
            crops = [pool(each, tokens) for each in encoded.crops]
            shown, _ = model.model.pack_image_features(crops, sizes["image_sizes"], image_newline=model.model.image_newline)
            short = shorten(rest, image_id, [len(each) for each in encoded.pooler_output], [len(each) for each in shown])
        else:
            shown = list(pool(torch.stack(encoded.pooler_output), tokens))
            short = shorten(rest, image_id, own, tokens)
        given = BaseModelOutputWithPooling(pooler_output=shown)
        found[f"{tokens} tokens"] = model(**short, mm_encoder_outputs={"image": given}).loss * (weight / sum(weights))
    return found


def oracle(right: Mapping[int, Sequence[bool]]) -> tuple[float, list[int | None]]:
    """Accuracy if the right scale were known for each sample, and that scale: the smallest whose answer is right, None if none.

    `right` says for each scale which samples it answers rightly.
    """
    scales = sorted(right)
    samples = list(zip(*(right[scale] for scale in scales), strict=True))
    chosen = [next((scale for scale, good in zip(scales, marks, strict=True) if good), None) for marks in samples]
    return sum(scale is not None for scale in chosen) / len(chosen), chosen
