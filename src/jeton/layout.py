"""The span map of a prompt: which columns are text and which show what part of which picture.

One `Layout` serves every later room. Rows are images (or videos), in the order in which they stand in the batch; a row lists the
image's language-model tokens in prompt order. Nothing assumes one image, a fixed count, or batch 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .place import Place

NEWLINE = -1


@dataclass(frozen=True, eq=False)
class Geometry:
    """How one image's M language-model tokens lie on its pictures; all fields on the CPU, (M,) long unless said otherwise.

    source: (M, s) the encoder patches that make the token, counted from the image's first patch; -1 where there is none.
    unit: the picture (0: the only one or the thumbnail; then crops or frames), `NEWLINE` for structure. row, col: in tokens,
    within the unit. height, width: the unit's grid in tokens. crop_row, crop_col, crop_rows, crop_cols: where a crop stands
    over the thumbnail. time: the number of the frame within a video, else 0. patches: encoder patches of the whole image. kinds:
    what each unit is.
    """

    source: Tensor
    unit: Tensor
    row: Tensor
    col: Tensor
    height: Tensor
    width: Tensor
    crop_row: Tensor
    crop_col: Tensor
    crop_rows: Tensor
    crop_cols: Tensor
    time: Tensor
    patches: int
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return self.unit.shape[0]

    @classmethod
    def of(
        cls,
        source: Tensor,
        unit: Tensor,
        row: Tensor,
        col: Tensor,
        grids: Sequence[tuple[int, int]],
        patches: int,
        kinds: tuple[str, ...],
        crops: tuple[int, int] = (1, 1),
    ) -> Geometry:
        """Fill in what follows: the grid of every unit and, for units after a thumbnail, their place in the crop grid."""
        heights, widths = (torch.tensor(side) for side in zip(*grids, strict=True))
        at = unit.clamp(min=0)
        crop = torch.where(unit > 0, unit - 1, 0) if kinds[0] == "thumbnail" else torch.zeros_like(unit)
        many = (unit > 0) & (torch.tensor(kinds[0] == "thumbnail"))
        one = torch.ones_like(unit)
        return cls(
            source=source if source.dim() == 2 else source[:, None],
            unit=unit,
            row=row,
            col=col,
            height=heights[at],
            width=widths[at],
            crop_row=crop // crops[1],
            crop_col=crop % crops[1],
            crop_rows=torch.where(many, crops[0], one),
            crop_cols=torch.where(many, crops[1], one),
            time=at if kinds[0] == "frame" else torch.zeros_like(unit),
            patches=patches,
            kinds=kinds,
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def picture(height: int, width: int, per_token: int = 1, frames: int = 1) -> Geometry:
        """One picture, or `frames` equal ones, of height x width tokens, each made of `per_token` consecutive patches."""
        count = frames * height * width
        at = torch.arange(count)
        source = torch.arange(count * per_token).reshape(count, per_token)
        cell = at % (height * width)
        kinds = ("image",) if frames == 1 else ("frame",) * frames
        grids = [(height, width)] * frames
        unit = at // (height * width)
        return Geometry.of(source, unit, cell // width, cell % width, grids, count * per_token, kinds)

    @staticmethod
    @lru_cache(maxsize=256)
    def blocks(height: int, width: int, side: int) -> Geometry:
        """One picture of height x width patches, row by row, of which squares of side x side make a token; what fills no square
        is left out."""
        rows, cols = height // side, width // side
        corner = (torch.arange(rows)[:, None] * width + torch.arange(cols)) * side
        inside = torch.arange(side)[:, None] * width + torch.arange(side)
        source = corner.flatten()[:, None] + inside.flatten()
        return replace(Geometry.picture(rows, cols), source=source, patches=height * width)

    @staticmethod
    def joined(pictures: Sequence[Geometry], kinds: tuple[str, ...], crops: tuple[int, int] = (1, 1)) -> Geometry:
        """Images of one picture each as the pictures of one image, in their order. kinds: what each is; crops: rows and columns
        of the crops behind a thumbnail."""
        starts = torch.tensor([0, *(item.patches for item in pictures)]).cumsum(0).tolist()
        source = torch.cat([_shift(item.source, start) for item, start in zip(pictures, starts, strict=False)])
        unit = torch.cat([torch.full((len(item),), number) for number, item in enumerate(pictures)])
        row, col = (torch.cat([getattr(item, name) for item in pictures]) for name in ("row", "col"))
        grids = [(int(item.height[0]), int(item.width[0])) for item in pictures]
        return Geometry.of(source, unit, row, col, grids, starts[-1], kinds, crops)

    @staticmethod
    @lru_cache(maxsize=256)
    def tiles(tile: Geometry, rows: int, cols: int) -> Geometry:
        """An image of rows x cols crops, row by row, and its thumbnail behind them, each a picture like `tile`."""
        count = rows * cols + 1
        line = Geometry.joined([tile] * count, ("image",) * count)
        grids = [(int(tile.height[0]), int(tile.width[0]))] * count
        kinds = ("thumbnail",) + ("crop",) * (count - 1)
        return Geometry.of(
            line.source, (line.unit + 1) % count, line.row, line.col, grids, line.patches, kinds, crops=(rows, cols)
        )


@dataclass(frozen=True)
class Rows:
    """Tokens of every image: slot (R, K) their number within the image, mask (R, K) true where real, None when all are."""

    slot: Tensor
    mask: Tensor | None

    def pick(self, images: Tensor) -> Rows:
        return Rows(self.slot[images], None if self.mask is None else self.mask[images])


@dataclass(frozen=True, eq=False)
class Album:
    """The pictures of one call of the encoder, before any prompt. R images, M tokens in the longest.

    source: (R, M, s) encoder patches of each token, counted over the whole call; -1 where there is none. place: where each token
    stands in its picture. patches: how many the call has. `patch_rows` are the candidates without structure tokens, `all_rows`
    with them.
    """

    geometry: tuple[Geometry, ...]
    source: Tensor
    place: Place
    patches: int
    patch_rows: Rows
    all_rows: Rows

    @staticmethod
    @lru_cache(maxsize=64)  # batches of like pictures come again and again: nothing is copied to the device twice
    def of(geometry: tuple[Geometry, ...], device: torch.device) -> Album:
        width = max(len(item) for item in geometry)
        starts = torch.tensor([0, *(item.patches for item in geometry)]).cumsum(0).tolist()
        sources = [_shift(item.source, start) for item, start in zip(geometry, starts, strict=False)]
        return Album(
            geometry=geometry,
            source=_stack(sources, width, -1).to(device),
            place=_places(geometry, width, device),
            patches=starts[-1],
            patch_rows=_rows([(item.unit >= 0).nonzero().flatten() for item in geometry], device),
            all_rows=_rows([torch.arange(len(item)) for item in geometry], device),
        )

    def __len__(self) -> int:
        return len(self.geometry)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(len(item) for item in self.geometry)

    @property
    def structure(self) -> tuple[int, ...]:
        """Structure tokens of each image."""
        return tuple(int((item.unit < 0).sum()) for item in self.geometry)

    @property
    def plain(self) -> bool:
        """True if every image is one picture and its tokens are the encoder's patches, one to one."""
        one_to_one = self.source.shape[-1] == 1 and self.place.units == 1
        return one_to_one and self.all_rows.mask is None and not any(self.structure)

    def candidates(self, structure: str) -> Rows:
        return self.all_rows if structure == "pool" else self.patch_rows

    def pick(self, images: Sequence[int]) -> Album:
        """The same pictures in another order, or several times (beams)."""
        at = torch.tensor(images, device=self.source.device)
        return replace(
            self,
            geometry=tuple(self.geometry[i] for i in images),
            source=self.source[at],
            place=self.place.pick(at),
            patch_rows=self.patch_rows.pick(at),
            all_rows=self.all_rows.pick(at),
        )

    def join(self, other: Album) -> Album:
        """Both calls' pictures as one call's, this one's patches first."""
        return Album.of(self.geometry + other.geometry, self.source.device)


@dataclass(frozen=True)
class Span:
    """A run of consecutive prompt columns of one kind, for people: text, image, thumbnail, crop, frame or newline."""

    start: int
    length: int
    kind: str
    image: int = -1
    unit: int = -1
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """Where the images of an album stand in a batch of prompts of `length` columns. sample: the prompt of each image. position:
    (R, M) its tokens' columns. between: (B, L) true at columns between the tokens of one image that show nothing of it (marks at
    the ends of rows, names of tiles, times of frames): no words about it. None where there are none."""

    album: Album
    sample: tuple[int, ...]
    position: Tensor
    batch: int
    length: int
    between: Tensor | None = None

    @property
    def images(self) -> int:
        return len(self.sample)

    @property
    def columns(self) -> Tensor:
        """(R, M) index into the flattened (batch * length) prompt; padding points one past its end."""
        sample = torch.tensor(self.sample, device=self.position.device)[:, None]
        flat = sample * self.length + self.position
        mask = self.album.all_rows.mask
        return flat if mask is None else flat.masked_fill(~mask, self.batch * self.length)

    def spans(self, sample: int) -> list[Span]:
        """The prompt of one sample as a list of spans in order."""
        kinds: list[tuple[str, int, int, tuple[int, int] | None]] = [("text", -1, -1, None)] * self.length
        for image in (i for i, at in enumerate(self.sample) if at == sample):
            geometry = self.album.geometry[image]
            for m, column in enumerate(self.position[image, : len(geometry)].tolist()):
                unit = int(geometry.unit[m])
                grid = (int(geometry.height[m]), int(geometry.width[m]))
                kinds[column] = ("newline", image, -1, None) if unit < 0 else (geometry.kinds[unit], image, unit, grid)
        found: list[Span] = []
        for column, kind in enumerate(kinds):
            last = found[-1] if found else None
            if last is not None and (last.kind, last.image, last.unit, last.grid) == kind:
                found[-1] = replace(last, length=last.length + 1)
            else:
                found.append(Span(column, 1, *kind))
        return found


def read_layout(visual: Tensor, album: Album) -> tuple[Layout, list[int]]:
    """The span map of prompts with `visual` columns (B, L), and which of the album's images stand where. One host sync."""
    images, samples, columns = _match(visual.cpu(), album.counts)
    picked = album if images == list(range(len(album))) else album.pick(images)
    position = _stack(columns, picked.source.shape[1], 0).to(album.source.device)
    between = _between(visual.shape, samples, columns, album.source.device)
    return Layout(picked, tuple(samples), position, visual.shape[0], visual.shape[1], between), images


def _between(
    shape: Sequence[int], samples: Sequence[int], columns: Sequence[Tensor], device: torch.device | str
) -> Tensor | None:
    """See `Layout`."""
    found = torch.zeros(*shape, dtype=torch.bool)
    for sample, at in zip(samples, columns, strict=True):
        found[sample, at[0] : at[-1] + 1] = True
        found[sample, at] = False
    return found.to(device) if bool(found.any()) else None


def _match(visual: Tensor, counts: tuple[int, ...]) -> tuple[list[int], list[int], list[Tensor]]:
    """For each image as it stands in the prompts: its number in the album, its prompt and its columns. Prompts that repeat the
    one before them (beams, several answers to one prompt) show the same images again."""
    total, shown = sum(counts), int(visual.sum())
    if shown == 0 or shown % total:
        raise ValueError(
            f"the prompts hold {shown} image tokens but the images make {total}; let the model's processor write the prompt."
        )
    copies = shown // total
    images: list[int] = []
    samples: list[int] = []
    columns: list[Tensor] = []
    first = after = 0
    for sample, row in enumerate(visual):
        first = after if sample % copies == 0 else first
        here, at, used = row.nonzero().flatten(), first, 0
        while used < len(here):
            if at >= len(counts) or used + counts[at] > len(here):
                raise ValueError(f"prompt {sample} has {len(here)} image tokens, which no whole number of its images makes.")
            images.append(at)
            samples.append(sample)
            columns.append(here[used : used + counts[at]])
            used, at = used + counts[at], at + 1
        after = at
    return images, samples, columns


def _shift(source: Tensor, start: int) -> Tensor:
    return torch.where(source < 0, source, source + start)


def _stack(items: Sequence[Tensor], width: int, fill: int) -> Tensor:
    """(M, ...) tensors of different M stacked to (R, width, ...); trailing sizes padded too."""
    depth = max((item.shape[1] for item in items if item.dim() > 1), default=0)
    out = []
    for item in items:
        if item.dim() > 1:
            item = torch.nn.functional.pad(item, (0, depth - item.shape[1]), value=fill)
            out.append(torch.nn.functional.pad(item, (0, 0, 0, width - item.shape[0]), value=fill))
        else:
            out.append(torch.nn.functional.pad(item, (0, width - item.shape[0]), value=fill))
    return torch.stack(out)


def _rows(slots: Sequence[Tensor], device: torch.device | str) -> Rows:
    width = max(len(slot) for slot in slots)
    ragged = any(len(slot) != width for slot in slots)
    mask = None
    if ragged:
        mask = torch.stack([torch.arange(width) < len(slot) for slot in slots]).to(device)
    return Rows(_stack(slots, width, 0).to(device), mask)


def _places(geometry: Sequence[Geometry], width: int, device: torch.device | str) -> Place:
    names = ("unit", "row", "col", "height", "width", "crop_row", "crop_col", "crop_rows", "crop_cols", "time")
    fields: dict[str, Any] = {name: _stack([getattr(item, name) for item in geometry], width, -1).to(device) for name in names}
    sides = (max(int(item.height.max()) for item in geometry), max(int(item.width.max()) for item in geometry))
    shapes = {shape for item in geometry for shape in zip(item.height.tolist(), item.width.tolist(), strict=True)}
    shape = shapes.pop() if len(shapes) == 1 else None
    return Place(**fields, units=max(len(item.kinds) for item in geometry), sides=sides, shape=shape)
