"""Short videos with real content: a handwritten digit that moves over a texture which stands still."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import tiny


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """(1797, 8, 8) pictures from 0 to 1, and what they show."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, height, width) smooth stripes and spots, from 0 to about 1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [
        sum(math.cos(p) + np.cos(a * y + b * x + p) for a, b, p in rng.uniform(0.2, 1.5, (3, 3))) / 8 + 0.5 for _ in range(3)
    ]
    return torch.tensor(np.stack(planes), dtype=torch.float32)


def moving_digit(
    frames: int, height: int, width: int, number: int = 0, step: int = 4, seed: int = 0, noise: float = 0.0
) -> Tensor:
    """(frames, 3, height, width): digit `number`, 8 x 8 pixels in white, goes `step` pixels to the right in every frame."""
    scene = texture(height, width, seed)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for frame in range(frames):
        picture = scene.clone()
        left = (frame * step) % (width - 7)
        picture[:, height // 2 - 4 : height // 2 + 4, left : left + 8] += digits()[0][number]
        out.append(picture + noise * torch.randn(picture.shape, generator=generator))
    return torch.stack(out)


def qwen_video(clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (F, 3, H, W) as Qwen2.5-VL's processor hands them on: patches (t h w, 3·2·PATCH²) in groups of 2 x 2, and (t, h, w).
    Two frames make one step in time."""
    frames, channels, height, width = clip.shape
    t, h, w, p = frames // 2, height // tiny.PATCH, width // tiny.PATCH, tiny.PATCH
    parts = (clip * 2 - 1).reshape(t, 2, channels, h // 2, 2, p, w // 2, 2, p)
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def prompts(clips: list[Tensor], text: tuple[int, int] = (3, 5)) -> tiny.Inputs:
    """A batch of prompts, each with one video, padded on the left."""
    singles, pixels, grids = [], [], []
    for number, clip in enumerate(clips):
        patches, grid = qwen_video(clip)
        before, after = (tiny.words(length, 20 + 10 * number + i)[0] for i, length in enumerate(text))
        before[-1], after[0] = tiny.START, tiny.END
        singles.append(torch.cat([before, torch.full((math.prod(grid) // 4,), tiny.VIDEO), after]))
        pixels.append(patches)
        grids.append(grid)
    longest = max(map(len, singles))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=tiny.PAD) for row in singles])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in singles])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.cat(pixels),
        "video_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": 2 * (ids == tiny.VIDEO).long(),
    }
