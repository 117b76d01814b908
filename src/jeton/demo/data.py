"""Scenes made from real handwriting: coloured digits of scikit-learn's `load_digits` on cluttered backgrounds.

The digit images are split once. Training scenes use only the one part, held-out scenes only the other.
A scene is SIZE x SIZE pixels and is seen by the model as GRID x GRID patches of PATCH pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from jeton.demo.backgrounds import background

SIZE, PATCH = 84, 7
GRID = SIZE // PATCH
MIN_DIGITS, MAX_DIGITS = 2, 5

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 45, 40),
    "green": (50, 205, 60),
    "blue": (70, 95, 250),
    "yellow": (240, 220, 50),
    "purple": (205, 60, 225),
    "white": (245, 245, 245),
}

BACKGROUND, UNCLEAR = -1, -2
_CANVAS = 22  # pixels; a digit is drawn into a square of this side
_SPACING = 20  # pixels between the centres of two digits, along x or along y


@dataclass(frozen=True)
class Digit:
    """One digit: its value 0..9, colour name, and the box (left, top, right, bottom) of its ink in pixels."""

    value: int
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """An image (SIZE, SIZE, 3) uint8, its digits, and `owner` (GRID * GRID,): the digit each patch shows.

    A patch with no ink is BACKGROUND; one that a digit only touches is UNCLEAR and carries no training target.
    """

    image: np.ndarray
    digits: tuple[Digit, ...]
    owner: np.ndarray


@cache
def digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digit images (N, 8, 8) uint8 and values (N,) of one split, "train" (80%) or "held-out" (20%)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = np.arange(len(digits.target))
    train, held_out = train_test_split(everything, test_size=0.2, random_state=0, stratify=digits.target)
    rows = {"train": train, "held-out": held_out}[split]
    return (digits.images[rows] * (255 / 16)).astype(np.uint8), digits.target[rows]


def _ink(rng: np.random.Generator, glyph: np.ndarray) -> np.ndarray:
    """Draws an 8 x 8 glyph slightly turned, sheared and scaled: (_CANVAS, _CANVAS) float32 opacity in 0..1."""
    scale = rng.uniform(2.2, 2.5, 2)  # pixels of the scene per pixel of the glyph
    angle, shear = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(-0.12, 0.12)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ np.array([[1, shear], [0, 1]]) / scale[:, None]
    # Padding keeps the border of the glyph from being smeared outwards.
    padded, middle = np.pad(glyph, 2), np.full(2, 6.0)
    offset = middle - inverse @ np.full(2, _CANVAS / 2)
    terms = (*inverse[0], offset[0], *inverse[1], offset[1])
    drawn = Image.fromarray(padded).transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, terms, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32) / 255 * 1.3, 0, 1)


def _corners(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Top left corners (x, y) of up to `count` canvases, as many as find room without overlapping digits."""
    placed: list[tuple[int, int]] = []
    for x, y in rng.integers(-1, SIZE - _CANVAS + 2, (100, 2)).tolist():
        if len(placed) < count and all(max(abs(x - u), abs(y - v)) >= _SPACING for u, v in placed):
            placed.append((x, y))
    return placed


def _box(opacity: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the ink in opacity (SIZE, SIZE)."""
    ys, xs = np.nonzero(opacity > 0.3)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _patch_owner(opacity: np.ndarray) -> np.ndarray:
    """Owner of each patch from the digits' opacity (D, SIZE, SIZE): (GRID * GRID,) int64."""
    cover = opacity.reshape(len(opacity), GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(len(opacity), -1)
    owner = cover.argmax(0)
    owner[cover.max(0) < 0.15] = UNCLEAR
    owner[cover.max(0) < 0.01] = BACKGROUND
    return owner


def make_scene(rng: np.random.Generator, split: str, crowded: bool = False) -> Scene:
    """Draws one scene of 2 to 5 digits, each in a colour of its own; a crowded one has up to 9, and colours repeat."""
    glyphs, values = digit_images(split)
    corners = _corners(rng, 9 if crowded else int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1)))
    count = len(corners)
    rows = rng.integers(0, len(glyphs), count)
    colours = rng.choice(list(COLOURS), count, replace=crowded).tolist()
    picture = background(rng, split, SIZE)
    opacity = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    digits = []
    for layer, row, colour, (x, y) in zip(opacity, rows, colours, corners):
        ink = _ink(rng, glyphs[row])
        left, top = max(x, 0), max(y, 0)
        part = layer[top : y + _CANVAS, left : x + _CANVAS]
        part[:] = ink[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]]
        tint = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 10, 3), 0, 255).astype(np.float32) / 255
        picture += layer[..., None] * (tint - picture)
        digits.append(Digit(int(values[row]), colour, _box(layer)))
    noisy = picture * 255 + rng.normal(0, 3, picture.shape)
    return Scene(np.clip(noisy, 0, 255).astype(np.uint8), tuple(digits), _patch_owner(opacity))
