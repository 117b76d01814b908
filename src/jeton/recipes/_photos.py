"""Crops of the photographs in scikit-image's wheel, drawn from a seed. Held-out crops come from other photographs."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PHOTOS = {
    "train": ("astronaut", "rocket", "brick", "grass", "camera", "moon", "coins", "immunohistochemistry", "hubble_deep_field"),
    "held-out": ("coffee", "chelsea", "gravel"),
}


@cache
def _photo(name: str) -> Image.Image:
    try:
        import skimage.data
    except ImportError as missing:
        raise ImportError("photographs to train on need scikit-image: pip install 'jeton[demo]'.") from missing
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def crops(count: int, size: int, seed: int, split: str = "train", largest: int = 4) -> Tensor:
    """(count, 3, size, size) in [0, 1]: squares of size to `largest` x size pixels of random photographs, scaled down, half of
    them mirrored."""
    rng, names, made = np.random.default_rng(seed), PHOTOS[split], []
    for _ in range(count):
        photo = _photo(names[rng.integers(len(names))])
        side = int(rng.integers(size, min(size * largest, *photo.size) + 1))
        x, y = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        made.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in made])).permute(0, 3, 1, 2).float() / 255


def whole(size: int, split: str = "held-out") -> Tensor:
    """(photographs, 3, size, size): the middle square of each photograph, scaled down."""
    made = []
    for name in PHOTOS[split]:
        photo = _photo(name)
        side = min(photo.size)
        x, y = ((extent - side) // 2 for extent in photo.size)
        made.append(np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255
