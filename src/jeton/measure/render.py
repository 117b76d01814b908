"""Text, tables and pictures drawn on one page, byte for byte the same wherever the same Pillow and font are installed."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARKER = "<img>"
NOISES = ("none", "low", "high")
_CELL = 6  # pixels between the border of a table's cell and its text
_COARSE = 32  # low noise varies over so many pixels


@dataclass(frozen=True)
class Style:
    """How a page looks; lengths in pixels. `gap` is added to the glyph height (ascent and descent) between lines. `noise` is
    Gaussian with standard deviation `strength` (grey levels, 0 to 255): "high" in every pixel, "low" in smooth blots."""

    width: int = 512
    min_height: int = 256
    font_size: int = 15
    padding: int = 20
    gap: int = 10
    noise: str = "none"
    strength: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {self.noise!r}.")
        if self.width - 2 * self.padding < 4 * self.font_size:
            raise ValueError(
                f"a page of width {self.width} with padding {self.padding} has no room for text of {self.font_size}."
            )

    @classmethod
    def drawn(cls, seed: int, **fixed: object) -> Style:
        """A style drawn at random: width 512 to 1024, font size 15 to 25, padding 5 to 30."""
        draw = np.random.default_rng(seed)
        sizes = {"width": (512, 1024), "font_size": (15, 25), "padding": (5, 30)}
        chosen = {name: int(draw.integers(low, high + 1)) for name, (low, high) in sizes.items()}
        return replace(cls(seed=seed), **{**chosen, **fixed})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first row is the head."""

    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[object]]) -> Table:
        """From rows of anything; all must be equally long."""
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            raise ValueError("a table needs at least one row and one column, and as many cells in every row.")
        return cls(tuple(tuple(str(cell) for cell in row) for row in rows))

    def text(self) -> str:
        """The table as Markdown."""
        head, *body = (f"| {' | '.join(row)} |" for row in self.rows)
        return "\n".join([head, "|" + "---|" * len(self.rows[0]), *body])


Part = str | Table | Image.Image


@dataclass(frozen=True)
class Word:
    """A word of the page's text, or the piece of it that stands on one line. number: its place among the words of the text; box:
    left, top, right, bottom."""

    number: int
    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Page:
    """A rendered page, and where the words of its text (not of its tables) stand."""

    image: Image.Image
    words: tuple[Word, ...]


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, laid out by Pillow itself."""
    return _font(size, bold)


@lru_cache(maxsize=64)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def render(parts: Part | Sequence[Part], style: Style | None = None, images: Sequence[Image.Image] = ()) -> Page:
    """Draw parts below each other on white: text wrapped at words, tables with borders and a bold head, pictures centred.

    Each `<img>` in a text stands for the next of `images`. Words longer than a line are broken; spaces at the start of a line
    and line breaks stay. Raises ValueError if markers and images do not match.
    """
    style = style or Style()
    listed = [parts] if isinstance(parts, str | Table | Image.Image) else list(parts)
    drawing = _Drawing(style)
    for part in _unmarked(listed, images):
        drawing.add(part)
    return drawing.finish()


def _unmarked(parts: Sequence[Part], images: Sequence[Image.Image]) -> list[Part]:
    """Parts with every marker replaced by its picture."""
    markers = sum(part.count(MARKER) for part in parts if isinstance(part, str))
    if markers != len(images):
        raise ValueError(f"the text has {markers} {MARKER} markers but {len(images)} images were given.")
    left, out = iter(images), list[Part]()
    for part in parts:
        if not isinstance(part, str):
            out.append(part)
            continue
        first, *rest = part.split(MARKER)
        out.append(first)
        for text in rest:
            out += [next(left), text]
    return [part for part in out if not isinstance(part, str) or part.strip()]


class _Drawing:
    """Parts are laid out first; how high the page must be is known at the end."""

    def __init__(self, style: Style) -> None:
        self.style, self.y = style, float(style.padding)
        self.inner = style.width - 2 * style.padding
        ascent, descent = font(style.font_size).getmetrics()
        self.pitch = ascent + descent + style.gap
        self.texts: list[tuple[float, float, str, bool]] = []
        self.borders: list[tuple[float, float, float, float]] = []
        self.pictures: list[tuple[int, int, Image.Image]] = []
        self.words: list[Word] = []
        self.counted = 0

    def add(self, part: Part) -> None:
        if isinstance(part, str):
            self._text(part.strip("\n"))
        elif isinstance(part, Table):
            self._table(part)
        else:
            self._picture(part)

    def _text(self, text: str) -> None:
        regular = font(self.style.font_size)
        for line, numbers in _wrapped(text, regular, self.inner, self.counted):
            self.texts.append((self.style.padding, self.y, line, False))
            for hit, number in zip(re.finditer(r"\S+", line), numbers, strict=True):
                left = self.style.padding + regular.getlength(line[: hit.start()])
                right = self.style.padding + regular.getlength(line[: hit.end()])
                self.words.append(Word(number, hit[0], (left, self.y, right, self.y + self.pitch - self.style.gap)))
            self.y += self.pitch
        self.counted += len(text.split())

    def _table(self, table: Table) -> None:
        widths = self._columns(table)
        for number, row in enumerate(table.rows):
            face = font(self.style.font_size, number == 0)
            cells = [[line for line, _ in _wrapped(c, face, w - 2 * _CELL, 0)] for c, w in zip(row, widths, strict=True)]
            height = max(len(lines) for lines in cells) * self.pitch
            x = float(self.style.padding)
            for lines, width in zip(cells, widths, strict=True):
                self.borders.append((x, self.y, x + width, self.y + height))
                for at, line in enumerate(lines):
                    self.texts.append((x + _CELL, self.y + at * self.pitch + self.style.gap / 2, line, number == 0))
                x += width
            self.y += height
        self.y += self.style.gap

    def _columns(self, table: Table) -> list[int]:
        """Widths of the columns: what their text takes, shrunk in proportion where that is too much."""
        faces = [font(self.style.font_size, number == 0) for number in range(len(table.rows))]
        longest = [
            max(face.getlength(line) for face, cell in zip(faces, column, strict=True) for line in cell.split("\n"))
            for column in zip(*table.rows, strict=True)
        ]
        wanted = [int(length) + 1 + 2 * _CELL for length in longest]
        if sum(wanted) <= self.inner:
            return wanted
        least = 2 * _CELL + 2 * self.style.font_size
        spare = self.inner - least * len(wanted)
        if spare < 0:
            raise ValueError(
                f"a table of {len(wanted)} columns does not fit a page of width {self.style.width}; use a wider one."
            )
        over = [max(0, width - least) for width in wanted]
        return [least + int(spare * part / max(1, sum(over))) for part in over]

    def _picture(self, image: Image.Image) -> None:
        shown = image.convert("RGB")
        if shown.width > self.inner:
            shown = shown.resize((self.inner, max(1, round(shown.height * self.inner / shown.width))), Image.Resampling.BICUBIC)
        self.pictures.append(((self.style.width - shown.width) // 2, int(self.y), shown))
        self.y += shown.height + self.style.gap

    def finish(self) -> Page:
        height = max(self.style.min_height, int(self.y) + self.style.padding)
        image = Image.new("RGB", (self.style.width, height), "white")
        for x, y, picture in self.pictures:
            image.paste(picture, (x, y))
        draw = ImageDraw.Draw(image)
        for box in self.borders:
            draw.rectangle(box, outline="black")
        for left, top, text, bold in self.texts:
            draw.text((left, int(top)), text, fill="black", font=font(self.style.font_size, bold))
        return Page(_noisy(image, self.style), tuple(self.words))


def _wrapped(text: str, face: ImageFont.FreeTypeFont, width: float, first: int) -> list[tuple[str, list[int]]]:
    """Lines no wider than `width`, each with the numbers of the words on it, counted from `first`."""
    lines: list[tuple[str, list[int]]] = []
    number = first
    for paragraph in text.expandtabs(4).split("\n"):
        line, numbers = "", list[int]()
        for piece in re.findall(r"\s+|\S+", paragraph):
            if piece.isspace():
                line += piece
                continue
            if line.strip() and face.getlength(line + piece) > width:
                lines.append((line.rstrip(), numbers))
                line, numbers = "", []
            while face.getlength(line + piece) > width and len(piece) > 1:
                fits = max(1, bisect_right(range(1, len(piece)), width, key=lambda end: face.getlength(line + piece[:end])))
                lines.append((line + piece[:fits], [*numbers, number]))
                line, numbers, piece = "", [], piece[fits:]
            line, numbers = line + piece, [*numbers, number]
            number += 1
        lines.append((line.rstrip(), numbers))
    return lines


def _noisy(image: Image.Image, style: Style) -> Image.Image:
    if style.noise == "none":
        return image
    draw = np.random.default_rng(style.seed)
    width, height = image.size
    if style.noise == "high":
        field = draw.standard_normal((height, width))
    else:
        coarse = draw.standard_normal((-(-height // _COARSE) + 1, -(-width // _COARSE) + 1)).astype(np.float32)
        field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    noisy = np.asarray(image, np.float32) + style.strength * field[..., None]
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
