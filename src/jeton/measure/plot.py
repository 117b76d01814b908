"""Accuracy against tokens or FLOPs, every method in one plot, as an inline SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .row import Row

Against = Literal["tokens", "flops"]

_COLOURS = (
    "#0b6fb8", "#d1495b", "#2a9d5c", "#8f5bc4", "#e08a00", "#008b8b", "#c2388f", "#7a5230", "#4757d1", "#6b8e23", "#b03a06",
    "#15a3c7", "#a08400", "#5b2a86", "#0d5c3f",
)  # fmt: skip
_MARKERS = "osD^v"
_GREY, _BLACK = "#8a9099", "#222222"
_ASIDE = 1.012  # factor between the places of two methods of the same budget
_GAP = 0.045  # smallest distance between labels, as a share of the height of a plot of usual size
_HEIGHT, _ROOM = 5.4, 20  # inches of a plot of usual size, and how many lines it names; more lines make it higher
_STYLE: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "jeton"}


def accuracy_plot(rows: Sequence[Row], against: Against = "tokens") -> str:
    """SVG text: what is spent on a logarithmic axis, less to the right; controls grey and dashed; lines named at their ends."""
    full, done = rows[0], [row for row in rows[1:] if row.reason is None]
    with rc_context(_STYLE):
        lines = _lines(done)
        more = max(1.0, len(lines) / _ROOM)
        figure = Figure(figsize=(9.6, _HEIGHT * more), layout="constrained")
        axes = figure.add_subplot()
        _frame(axes, full, done, against)
        _labels(axes, [_draw(axes, number, line, against, len(lines)) for number, line in enumerate(lines)], _GAP / more)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _spent(row: Row, against: Against) -> float:
    return (row.kept if against == "tokens" else 100 * (row.flops or 0)) or 1


def _lines(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of every method from many tokens to few; controls last."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.control, -(row.kept or 0))):
        lines.setdefault(row.method, []).append(row)
    return list(lines.values())


def _frame(axes: Axes, full: Row, rows: Sequence[Row], against: Against) -> None:
    """Axes, the full model's accuracy with its interval, and ticks at what was spent."""
    spent = [_spent(row, against) for row in rows] or [_spent(full, against)]
    axes.set_xscale("log")
    axes.set_xlim(max(spent) * 1.25, min(spent) * 0.85)
    ticks = _spaced(sorted({round(each) for each in spent} if against == "tokens" else range(5, 101, 5), reverse=True))
    axes.set_xticks(ticks, [str(tick) if against == "tokens" else f"{tick}%" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(max(spent) * 1.25, min(spent) * 0.85)
    what = "visual tokens kept per image" if against == "tokens" else "FLOPs of encoder and prefill, share of the full model's"
    axes.set_xlabel(f"{what} (fewer to the right)")
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.axhspan(full.low or 0, full.high or 0, color=_BLACK, alpha=0.06, linewidth=0)
    axes.axhline(full.accuracy or 0, color=_BLACK, linewidth=1, linestyle=(0, (1, 2)))
    place: Any = {"xytext": (4, 4), "textcoords": "offset points", "color": _BLACK}
    axes.annotate(f"all {full.kept:.0f} tokens", (max(spent) * 1.25, full.accuracy or 0), **place)


def _spaced(ticks: Sequence[int]) -> list[int]:
    """Descending ticks that are far enough apart to be read."""
    chosen: list[int] = []
    for tick in ticks:
        if not chosen or chosen[-1] / max(tick, 1) > 1.18:
            chosen.append(tick)
    return chosen


def _draw(axes: Axes, number: int, line: Sequence[Row], against: Against, lines: int) -> tuple[Row, str, float]:
    """One method's line with its intervals, set a little aside from its neighbours'; its last row, colour, and where it ends."""
    control = line[0].control
    colour = _GREY if control else _COLOURS[number % len(_COLOURS)]
    marker = _MARKERS[(number if control else number // len(_COLOURS)) % len(_MARKERS)]
    aside = _ASIDE ** ((number - lines / 2) * min(1, _ROOM / lines)) if against == "tokens" else 1
    x = [_spent(row, against) * aside for row in line]
    y = [row.accuracy or 0 for row in line]
    below = [middle - (row.low or 0) for middle, row in zip(y, line, strict=True)]
    above = [(row.high or 0) - middle for middle, row in zip(y, line, strict=True)]
    axes.errorbar(x, y, (below, above), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.4)
    style = (0, (4, 2)) if control else "-"
    axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linestyle=style, linewidth=1.2 if control else 1.8)
    return line[-1], colour, x[-1]


def _labels(axes: Axes, ends: Sequence[tuple[Row, str, float]], gap: float) -> None:
    """Names right of the plot, pushed apart until none overlaps, each joined to the end of its line."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: end[0].accuracy or 0)
    heights = _apart([((row.accuracy or 0) - low) / (high - low) for row, *_ in order], gap)
    for (row, colour, x), height in zip(order, heights, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 4}
        axes.annotate(
            row.method,
            (x, row.accuracy or 0),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color="#5d636b" if row.control else colour,
            fontstyle="italic" if row.control else "normal",
            arrowprops=leader | {"relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float = _GAP) -> list[float]:
    """Ascending heights moved until neighbours keep their distance: half way between pushing all up and pushing all down."""
    up, down = list(heights), list(heights)
    for i in range(1, len(heights)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in range(len(heights) - 2, -1, -1):
        down[i] = min(down[i], down[i + 1] - gap)
    return [(a + b) / 2 for a, b in zip(up, down, strict=True)]
