"""Where tokens stand in their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Lattice(NamedTuple):
    """Tokens that form a map of height x width, row by row, and the side of the windows in which an encoder looks at it (those at
    its right and lower borders may be smaller); 0 where it has none."""

    height: int
    width: int
    window: int = 0


@dataclass(frozen=True)
class Place:
    """Where each token of a row stands in its picture; every field (B, N), long.

    `unit` numbers the pictures inside one row: 0 is the only picture or the thumbnail, 1, 2, ... are crops or video frames, and
    -1 marks structure that shows nothing (newline tokens, row breaks). `row` and `col` count patches from the top left of that
    unit. `height` and `width` are the grid of the token's unit. `units` is the largest number of units in any row.

    Any-resolution pictures also say how their crops lie over the thumbnail: `crop_row` and `crop_col` place the token's crop in
    a grid of `crop_rows` x `crop_cols` crops (all 0 for rows that are a single picture; the thumbnail's position is 0, 0).

    Videos say when: `time` is the number of the token's frame within its video, 0 in every picture that does not move; None where
    nobody knows, and then no unit follows another. `sides` are rows and columns of the largest grid of any unit; `shape` is the
    height and width that all units of all rows have, where it is known without looking at the device. `window` is the side of the
    windows in which an encoder looks at them, 0 where it looks at all of a picture.
    """

    unit: Tensor
    row: Tensor
    col: Tensor
    height: Tensor
    width: Tensor
    units: int = 1
    crop_row: Tensor | None = None
    crop_col: Tensor | None = None
    crop_rows: Tensor | None = None
    crop_cols: Tensor | None = None
    time: Tensor | None = None
    sides: tuple[int, int] | None = None
    shape: tuple[int, int] | None = None
    window: int = 0

    @classmethod
    def grid(cls, batch: int, height: int, width: int, device: torch.device | str | None = None) -> Place:
        """The plain case: each row is one picture of height x width patches, listed row by row."""
        cells = torch.arange(height * width, device=device).expand(batch, -1)
        return cls(
            torch.zeros_like(cells),
            cells // width,
            cells % width,
            torch.full_like(cells, height),
            torch.full_like(cells, width),
            sides=(height, width),
            shape=(height, width),
        )

    @classmethod
    def clip(cls, batch: int, frames: int, height: int, width: int, device: torch.device | str | None = None) -> Place:
        """Each row is one video of equal frames of height x width patches, listed frame by frame."""
        cells = torch.arange(frames * height * width, device=device).expand(batch, -1)
        frame, cell = cells // (height * width), cells % (height * width)
        high, wide = torch.full_like(cells, height), torch.full_like(cells, width)
        return cls(frame, cell // width, cell % width, high, wide, frames, time=frame, sides=(height, width))

    def gather(self, index: Tensor) -> Place:
        """The places of the tokens at `index` (B, K)."""
        return self._map(lambda field: field.gather(1, index))

    def pick(self, rows: Tensor) -> Place:
        """The places of some rows."""
        return self._map(lambda field: field[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Place:
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return Place(**{name: change(f) if isinstance(f, Tensor) else f for name, f in fields.items()})

    @property
    def structure(self) -> Tensor:
        """(B, N) true for tokens that show no part of a picture."""
        return self.unit < 0
