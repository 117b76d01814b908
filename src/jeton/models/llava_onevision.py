"""LLaVA-OneVision: any-resolution crops resized to a limit; single tiles where a prompt has several images; pooled frames."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import NEWLINE, Geometry
from .base import Inputs
from .llava_next import LlavaNext, bilinear_taps, pooled_frames, shown_videos
from .registry import adapter


@adapter("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")
class LlavaOnevision(LlavaNext):
    """Large crops and all frames are resized behind the projector; every tile that stands alone and every video ends in one
    newline."""

    mixes = True
    videos = True

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        side = self.side
        if stream == "video":
            videos, frames = shown_videos(inputs)
            return [_video(frames, side)] * videos
        aspect = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        limit = int(aspect.removeprefix("anyres_max_"))
        sizes = inputs["image_sizes"].tolist()
        tile = _tile(side)
        alone = _alone(inputs.get("batch_num_images"), len(sizes))
        # the counts may speak of more images than this call brings: a later turn brings one of several
        return [self.crops(*size, limit) if single else tile for size, single in zip(sizes, alone, strict=False)]


@lru_cache(maxsize=64)
def _video(frames: int, side: int) -> Geometry:
    return _ended(pooled_frames(frames, side, bilinear_taps(side, (side + 1) // 2)))


@lru_cache(maxsize=64)
def _tile(side: int) -> Geometry:
    return _ended(Geometry.picture(side, side))


def _alone(counts: Tensor | None, images: int) -> list[bool]:
    """For each image whether it is its prompt's only one and so cut into crops; without `counts` all are."""
    if counts is None:
        return [True] * images
    return [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]


def _ended(geometry: Geometry) -> Geometry:
    """The same with a newline behind."""
    blank = {"source": -1, "unit": NEWLINE, "row": 0, "col": 0}
    longer = {}
    for item in fields(geometry):
        value = getattr(geometry, item.name)
        if isinstance(value, Tensor):
            last = torch.full_like(value[-1:], blank[item.name]) if item.name in blank else value[-1:]
            longer[item.name] = torch.cat([value, last])
    return replace(geometry, **longer)
