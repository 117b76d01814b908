"""Rendered pages: the same bytes again, readable, wrapped, and with words where they are said to be."""

from __future__ import annotations

import string

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jeton.measure.render import Style, Table, font, render

TEXT = "A quick fox (age 7) isn't tired!\n\n  x = y[0] + {z};"


def read(line: Image.Image, size: int) -> str:
    """The text of one line, letter by letter: the next letter is one whose drawing, after what was read, has the same ink."""
    face, ink = font(size), np.asarray(line.convert("L"))
    alphabet = [letter for letter in string.printable if letter not in "\t\n\r\x0b\x0c"]
    alphabet.sort(key=lambda letter: -face.getlength(letter))

    def drawn(text: str) -> np.ndarray:
        image = Image.new("RGB", line.size, "white")
        ImageDraw.Draw(image).text((0, 0), text, fill="black", font=face)
        return np.asarray(image.convert("L"))

    end = int(np.flatnonzero((ink < 255).any(0)).max()) + 1 if (ink < 255).any() else 0
    stack = [""]
    while stack:
        text = stack.pop()
        if np.array_equal(drawn(text), ink):
            return text
        if face.getlength(text) > end + size:
            continue
        for letter in alphabet:
            longer = text + letter
            sure = max(0, int(face.getlength(longer)) - 2)  # further right the next letter may reach in
            if letter == " " and text.endswith("   "):
                continue
            if np.array_equal(drawn(longer)[:, :sure], ink[:, :sure]):
                stack.append(longer)
    raise AssertionError("no text draws this line")


@pytest.mark.parametrize("size", [15, 22])
def test_an_exact_glyph_matcher_reads_the_page(size: int) -> None:
    style = Style(font_size=size, width=180)
    page = render(TEXT, style)
    pitch = sum(font(size).getmetrics()) + style.gap
    tops = sorted({word.box[1] for word in page.words})
    left = style.padding
    lines = [read(page.image.crop((left, int(top), style.width, int(top) + pitch - style.gap + 2)), size) for top in tops]
    assert " ".join(" ".join(lines).split()) == " ".join(TEXT.split())
    assert any(line.startswith("  x") for line in lines) and len(lines) > 2
    with pytest.raises(AssertionError, match="no text"):
        read(render("plain", Style(font_size=size + 1)).image.crop((left, 20, 300, 48)), size)


def test_the_same_seed_gives_the_same_bytes() -> None:
    for noise in ("none", "low", "high"):
        first, again = (render([TEXT, Table.of([["a", "b"], [1, 2]])], Style(noise=noise, seed=5)) for _ in range(2))
        assert first.image.tobytes() == again.image.tobytes() and first.words == again.words
    other = render(TEXT, Style(noise="high", seed=6)).image.tobytes()
    assert other != render(TEXT, Style(noise="high", seed=5)).image.tobytes()
    assert Style.drawn(3) == Style.drawn(3) != Style.drawn(4)
    assert Style.drawn(3, font_size=20).font_size == 20


def test_drawn_styles_stay_within_their_ranges() -> None:
    styles = [Style.drawn(seed) for seed in range(200)]
    for name, low, high in (("width", 512, 1024), ("font_size", 15, 25), ("padding", 5, 30)):
        values = {getattr(style, name) for style in styles}
        assert low <= min(values) and max(values) <= high and len(values) > 5


def test_low_noise_is_smooth_and_high_noise_is_not() -> None:
    steps = {}
    for noise in ("low", "high"):
        grey = np.asarray(render("", Style(noise=noise, strength=30)).image.convert("L"), float)
        steps[noise] = np.abs(np.diff(grey, axis=1)).mean()
    assert 0 < steps["low"] < steps["high"] / 4


def test_text_wraps_inside_the_padding_and_the_page_grows() -> None:
    style = Style(width=200, padding=25)
    page = render("word " * 120 + "x" * 300, style)
    ink = np.asarray(page.image.convert("L")) < 200
    assert not ink[:, : style.padding - 1].any() and not ink[:, style.width - style.padding + 2 :].any()
    assert page.image.height > style.min_height and not ink[-style.padding // 2 :].any()
    assert render("short", style).image.size == (200, 256)
    assert {word.number for word in page.words} == set(range(121))
    assert "".join(word.text for word in page.words if word.number == 120) == "x" * 300


def test_word_boxes_hold_the_ink_of_their_words() -> None:
    page = render("one two\nthree", Style())
    ink = np.asarray(page.image.convert("L")) < 255
    left = ink.copy()
    for word in page.words:
        a, b, c, d = (int(x) for x in word.box)
        assert ink[b:d, a : c + 1].any()
        left[b : d + 1, a : c + 2] = False
    assert not left.any() and [word.text for word in page.words] == ["one", "two", "three"]


def test_a_table_has_borders_and_a_bold_head_and_wraps_its_cells() -> None:
    style = Style(width=260)
    page = render(Table.of([["name", "remark"], ["A", "a remark that is much too long for its column " * 2]]), style)
    dark = np.asarray(page.image.convert("L")) < 60
    assert (dark[:, style.padding + 1 : style.width - style.padding - 2].mean(1) > 0.9).sum() >= 3  # rules across the table
    head = render(Table.of([["wide", "b"], ["wide", "b"]]), Style()).image
    grey = np.asarray(head.convert("L"))
    pitch = sum(font(15).getmetrics()) + 10
    first, second = (int((255 - grey[20 + i * pitch + 2 : 20 + (i + 1) * pitch - 1, 22:60].astype(int)).sum()) for i in (0, 1))
    assert first > 1.15 * second


def test_pictures_stand_centred_where_their_marker_is() -> None:
    red = Image.new("RGB", (60, 30), "red")
    page = render("above <img> below", Style(width=300), [red])
    seen = (np.asarray(page.image) == (255, 0, 0)).all(2)
    rows, cols = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (cols.min(), cols.max()) == (120, 179) and len(rows) == 30
    tops = {word.text: word.box[1] for word in page.words}
    assert tops["above"] < rows.min() < rows.max() < tops["below"]
    wide = render(Image.new("RGB", (900, 90), "red"), Style(width=300)).image
    assert (np.asarray(wide) == (255, 0, 0)).all(2).any(0).sum() == 260


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: render("a <img> b"), "1 <img> markers but 0 images"),
        (lambda: Table.of([["a"], ["b", "c"]]), "as many cells"),
        (lambda: Style(noise="pink"), "noise must be"),
        (lambda: Style(width=60), "no room"),
        (lambda: render(Table.of([["x" * 40] * 20] * 2)), "does not fit"),
    ],
)
def test_what_cannot_be_drawn_is_refused(what, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what()
