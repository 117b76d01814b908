"""LLaVA-NeXT: a thumbnail and any-resolution crops; the crops are stitched, cut to the picture and given a newline per row.

LLaVA-NeXT-Video adds videos, whose frames are pooled and have no newlines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..layout import NEWLINE, Geometry
from .base import Inputs
from .llava import Llava
from .registry import adapter


@adapter("LlavaNextForConditionalGeneration", "LlavaNextModel")
class LlavaNext(Llava):
    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        self.check()
        return [self.crops(height, width) for height, width in inputs["image_sizes"].tolist()]

    @property
    def side(self) -> int:
        """Patches along a side of a crop or frame."""
        config = self.model.config.vision_config
        return config.image_size // config.patch_size

    def crops(self, height: int, width: int, limit: int | None = None) -> Geometry:
        """The tokens of one any-resolution image of height x width pixels; see `any_resolution`."""
        config = self.model.config
        pinpoints = tuple(tuple(point) for point in config.image_grid_pinpoints)
        return any_resolution(int(height), int(width), pinpoints, config.vision_config.image_size, self.side, limit)


@adapter("LlavaNextVideoForConditionalGeneration", "LlavaNextVideoModel")
class LlavaNextVideo(LlavaNext):
    """Frames are pooled in squares in front of the projector."""

    mixes = True
    videos = True

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        if stream == "image":
            return super().geometry(inputs, stream)
        self.check()
        videos, frames = shown_videos(inputs)
        return [_pooled_video(frames, self.side, self.model.config.spatial_pool_stride)] * videos


def shown_videos(inputs: Inputs) -> tuple[int, int]:
    """How many videos `get_video_features` is given, and frames of each; older versions call them pixel_values."""
    pixels = inputs["pixel_values_videos"] if "pixel_values_videos" in inputs else inputs["pixel_values"]
    videos, frames = pixels.shape[:2]
    return videos, frames


@lru_cache(maxsize=64)
def _pooled_video(frames: int, side: int, step: int) -> Geometry:
    return pooled_frames(frames, side, torch.arange(side // step * step).reshape(-1, step))


def pooled_frames(frames: int, side: int, taps: Tensor) -> Geometry:
    """A video of side x side patches a frame. taps (n, s): the patches along a side that make each of the n tokens along it."""
    out = len(taps)
    cells = (taps[:, None, :, None] * side + taps[None, :, None, :]).reshape(out * out, -1)
    source = (torch.arange(frames)[:, None, None] * side**2 + cells).flatten(0, 1)
    return replace(Geometry.picture(out, out, frames=frames), source=source, patches=frames * side**2)


def bilinear_taps(length: int, out: int) -> Tensor:
    """(out, 2) the two of `length` cells between which each of `out` cells lies when a map is resized (corners not aligned)."""
    first = ((torch.arange(out) + 0.5) * length / out - 0.5).clamp(min=0).long()
    return torch.stack([first, (first + 1).clamp(max=length - 1)], 1)


@lru_cache(maxsize=256)
def any_resolution(
    height: int, width: int, pinpoints: tuple[Sequence[int], ...], picture: int, side: int, limit: int | None = None
) -> Geometry:
    """The tokens of one image: the thumbnail row by row, then the stitched crops with newlines. Crops that together have more
    patches than `limit` pictures are resized to about so many."""
    rows, cols = get_anyres_image_grid_shape((height, width), [list(point) for point in pinpoints], picture)
    # number the rows and columns of the stitched map, then let the model's own rule cut the padding away
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(cols * side), indexing="ij")
    cut = unpad_image(torch.stack([y, x]), (height, width))
    tall, wide = cut.shape[1:]
    top, left = cut[:, 0, 0].tolist() if tall and wide else (0, 0)  # of a thin picture nothing may be left
    ratio = math.sqrt(tall * wide / (limit * side**2)) if limit else 1.0
    shrink = ratio if ratio > 1.1 else None
    crop_y, row, in_height, taps_y = _axis(top, tall, side, shrink)
    crop_x, col, in_width, taps_x = _axis(left, wide, side, shrink)
    y, x = taps_y[:, None, :, None], taps_x[None, :, None, :]
    patch = (1 + y // side * cols + x // side) * side**2 + y % side * side + x % side
    shape = patch.shape[:2]
    unit = (1 + crop_y[:, None] * cols + crop_x).expand(shape)
    lie = torch.stack([unit, row[:, None].expand(shape), col.expand(shape)], -1)
    crops = torch.cat([lie, patch.flatten(2)], -1)
    line = torch.full((shape[0], 1, crops.shape[-1]), -1)
    line[..., 0], line[..., 1:3] = NEWLINE, 0
    per = torch.arange(side**2)
    thumbnail = torch.full((side**2, crops.shape[-1]), -1)
    thumbnail[:, :4] = torch.stack([torch.zeros_like(per), per // side, per % side, per], 1)
    told = torch.cat([thumbnail, torch.cat([crops, line], 1).flatten(0, 1)])
    units = 1 + rows * cols
    grids = [(side, side)] + [(in_height, in_width)] * (units - 1)
    kinds = ("thumbnail",) + ("crop",) * (units - 1)
    return Geometry.of(told[:, 3:], *told[:, :3].unbind(1), grids, units * side**2, kinds, crops=(rows, cols))


def _axis(start: int, length: int, side: int, shrink: float | None) -> tuple[Tensor, Tensor, int, Tensor]:
    """One axis of the stitched map, cut to `length` cells from `start` on, perhaps resized: for each token the crop it stands in
    and its number there, the tokens a crop has, and the cells (n, s) that make each."""
    if shrink is None:
        cell = start + torch.arange(length)
        return cell // side, cell % side, side, cell[:, None]
    out = int(length // shrink)
    middle = 2 * out * start + (2 * torch.arange(out) + 1) * length  # of each token, in cells times 2 * out: exact
    crop = middle // (2 * out * side)
    within = (middle - crop * 2 * out * side) // (2 * length)
    return crop, within, -(-side * out // length), start + bilinear_taps(length, out)
