"""Textured, cluttered backgrounds that never use the digits' saturated colours.

Half are crops of the photographs that ship inside scikit-image's wheel, half are procedural (gratings, clouds).
Held-out scenes use other photographs than training scenes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

PHOTOS = {
    "train": ("astronaut", "chelsea", "rocket", "brick", "grass", "camera", "moon"),
    "held-out": ("coffee", "gravel"),
}


@cache
def _photo(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _crop(rng: np.random.Generator, names: tuple[str, ...], size: int) -> np.ndarray:
    photo = _photo(names[rng.integers(len(names))])
    side = int(rng.integers(size, min(photo.size) // 2 + 1))
    x, y = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return np.asarray(crop, dtype=np.float32) / 255


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) noise with detail at three scales."""
    total = np.zeros((size, size, 3), dtype=np.float32)
    for cells in (3, 7, 21):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / (255 * 3)
    return total


def _grating(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) stripes of a random direction, period (4 to 20 pixels) and pair of colours."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(4, 20), rng.uniform(0, 2 * np.pi)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    first, second = rng.random((2, 3), dtype=np.float32)
    return first + wave[..., None].astype(np.float32) * (second - first)


def _clutter(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Draws 4 to 10 strokes and blobs, so that an edge alone does not mean a digit."""
    image = Image.fromarray((picture * 255).astype(np.uint8))
    draw, size = ImageDraw.Draw(image), image.width
    for _ in range(rng.integers(4, 11)):
        x, y = rng.integers(0, size, 2).tolist()
        dx, dy = rng.integers(-14, 15, 2).tolist()
        shade = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=shade, width=int(rng.integers(1, 4)))
        else:
            draw.ellipse((x, y, x + abs(dx) // 2 + 1, y + abs(dy) // 2 + 1), fill=shade)
    return np.asarray(image, dtype=np.float32) / 255


def background(rng: np.random.Generator, split: str, size: int) -> np.ndarray:
    """One background: (size, size, 3) float32 in 0..1, dark and dull enough for bright digits to stand out."""
    if rng.random() < 0.5:
        picture = _crop(rng, PHOTOS[split], size)
    else:
        picture = np.clip((_clouds if rng.random() < 0.5 else _grating)(rng, size), 0, 1)
    picture = _clutter(rng, picture)
    grey = picture.mean(-1, keepdims=True)
    dull = grey + 0.35 * (picture - grey)
    return (0.05 + rng.uniform(0.35, 0.55) * dull).astype(np.float32)
