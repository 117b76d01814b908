"""Rows of tokens to reduce: single pictures, and any-resolution pictures with a thumbnail and crops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jeton.place import Place

_FIELDS = ("unit", "row", "col", "height", "width", "crop_row", "crop_col", "crop_rows", "crop_cols")


def _anyres(rows: int, cols: int, height: int, width: int) -> Place:
    listing: dict[str, list[int]] = {name: [] for name in _FIELDS}
    for unit in range(1 + rows * cols):
        crop = max(0, unit - 1)
        for cell in range(height * width):
            values = (unit, cell // width, cell % width, height, width, crop // cols, crop % cols, rows, cols)
            for name, value in zip(_FIELDS, values, strict=True):
                listing[name].append(value)
    return Place(**{name: torch.tensor([values]) for name, values in listing.items()}, units=1 + rows * cols)


@pytest.fixture
def anyres() -> Callable[[int, int, int, int], Place]:
    """One row: a thumbnail of height x width tokens and rows x cols crops of the same size."""
    return _anyres
