"""Pictures of a reduction: what was dropped is dark, what was merged shares a colour and an outline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from .run import Run

DARK = 0.22  # brightness left to dropped patches
_BLEND = 0.6  # share of the mean colour in a merged group
_LINE = np.array([255, 255, 255], dtype=np.float32)


def overlay(image: Image.Image, assign: Tensor, size: int | None = None) -> Image.Image:
    """The image with one unit's assignment map (h, w) drawn over it.

    `assign` holds for every patch the number of its new token, -1 where it was dropped. Dropped patches are darkened; patches
    that share a new token are tinted with their mean colour and outlined together; patches kept alone stay as they are. `size`
    is the width of the result in pixels.
    """
    if assign.dim() != 2:
        raise ValueError(f"an assignment map is (h, w), got {tuple(assign.shape)}.")
    if size is not None:
        image = image.resize((size, max(1, round(size * image.height / image.width))), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    groups = _spread(assign.cpu().numpy(), *pixels.shape[:2])
    _tint(pixels, groups, assign.cpu().numpy())
    pixels[groups < 0] = _dim(pixels[groups < 0])
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def sheet(pictures: Sequence[Image.Image], maps: Sequence[Tensor], size: int) -> Image.Image:
    """All units of one image side by side: thumbnail first, then crops. One picture serves all maps where there is only one."""
    if len(pictures) < len(maps):
        pictures = [pictures[0]] * len(maps)
    panels = [overlay(picture, one, size) for picture, one in zip(pictures, maps, strict=False)]
    gap = max(2, size // 40)
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    canvas = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width + gap
    return canvas


def seen(run: Run, image: int) -> list[Image.Image]:
    """The pictures of one image (thumbnail and crops, or frames) as the encoder saw them, de-normalised."""
    encoder, site, layout = run.encoder, run.site, run.layout
    pixels = site.inputs.get("pixel_values")
    if encoder.packed or pixels is None or pixels.dim() != 4:
        raise ValueError(f"{encoder.name} is given patches, not pictures; say what to draw on with of=IMAGE.")
    numbers = [image]
    if layout is not None:
        units = layout.album.place.unit[image]
        first = {int(unit): at for at, unit in reversed([*enumerate(units.tolist())]) if unit >= 0}
        numbers = [int(layout.album.source[image, first[unit]].max()) // site.patches for unit in sorted(first)]
    shown = pixels[numbers].float().cpu()
    mean, std = (torch.tensor(values)[: shown.shape[1], None, None] for values in (encoder.pixel_mean, encoder.pixel_std))
    levels = ((shown * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(one.expand(3, -1, -1).permute(1, 2, 0).numpy()) for one in levels]


def _spread(assign: np.ndarray, height: int, width: int) -> np.ndarray:
    """The map at pixel resolution: (height, width)."""
    rows = np.arange(height) * assign.shape[0] // height
    cols = np.arange(width) * assign.shape[1] // width
    return assign[rows[:, None], cols[None, :]]


def _tint(pixels: np.ndarray, groups: np.ndarray, assign: np.ndarray) -> None:
    """Mean colour and outline for every group of more than one patch, in place."""
    numbers, counts = np.unique(assign[assign >= 0], return_counts=True)
    merged = np.isin(groups, numbers[counts > 1])
    if not merged.any():
        return
    flat, total = np.where(merged, groups, -1).ravel() + 1, int(assign.max()) + 2
    area = np.bincount(flat, minlength=total).clip(1)
    sums = [np.bincount(flat, pixels[..., c].ravel(), total) for c in range(3)]
    mean = np.stack(sums, 1) / area[:, None]
    colour = mean[flat].reshape(pixels.shape)
    pixels[merged] = (_BLEND * colour + (1 - _BLEND) * pixels)[merged]
    pixels[_outline(groups, merged)] = _LINE


def _outline(groups: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """True for the pixels of merged groups that border on another group; between two merged groups on one side only."""
    lines = np.zeros(groups.shape, dtype=bool)
    for line, group, merge in ((lines, groups, merged), (lines.T, groups.T, merged.T)):
        border = group[1:] != group[:-1]
        line[:-1] |= border & merge[:-1]
        line[1:] |= border & merge[1:] & ~merge[:-1]
    return lines


def _dim(pixels: np.ndarray) -> np.ndarray:
    """Grey and dark, so that a dropped patch cannot be taken for a dark one that was kept."""
    return DARK * (0.3 * pixels + 0.7 * pixels.mean(-1, keepdims=True))
