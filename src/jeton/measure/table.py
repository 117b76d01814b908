"""The comparison as a table: its columns, and how they look in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .plan import budget
from .row import Row

if TYPE_CHECKING:
    from .compare import Comparison


WIDE = 140  # characters that every column fits in
_SPARE = ("95% interval", "first token", "2nd turn", "retained")  # what a narrow terminal does without, first to go first


def percent(share: float | None) -> str:
    """0.25 as 25%; nothing where it is not known."""
    return "" if share is None else f"{100 * share:.0f}%"


@dataclass(frozen=True)
class Column:
    """A heading, the value of a row that is sorted by, and its text."""

    name: str
    value: Callable[[Row], Any]
    show: Callable[[Any], str] = str

    def text(self, row: Row) -> str:
        value = self.value(row)
        return "" if value is None else self.show(value)


COLUMNS = (
    Column("method", lambda row: row.method),
    Column("tokens", lambda row: row.kept, "{:.4g}".format),
    Column("accuracy", lambda row: row.accuracy, "{:.3f}".format),
    Column(
        "95% interval",
        lambda row: None if row.low is None else (row.low, row.high),
        lambda ends: "{:.2f} to {:.2f}".format(*ends),
    ),
    Column("retained", lambda row: row.retained, percent),
    Column("FLOPs", lambda row: row.flops, percent),
    Column("first token", lambda row: row.seconds, lambda seconds: f"{1e3 * seconds:.1f} ms"),
    Column("speed-up", lambda row: row.speedup, "{:.2f}x".format),
    Column("realised", lambda row: row.realised, percent),
    Column("2nd turn", lambda row: row.second_turn, "{:.3f}".format),
)


def table(comparison: Comparison, width: int = WIDE) -> Table:
    """A block a budget, best accuracy first; controls dimmed, the best of a block bold, and reasons below.

    Where `width` characters do not suffice, the least important columns stay away.
    """
    columns = list(COLUMNS)
    made = _table(comparison, columns)
    measure = Console(width=WIDE)
    for name in _SPARE:
        if measure.measure(made).maximum <= width:
            break
        columns = [column for column in columns if column.name != name]
        made = _table(comparison, columns)
    return made


def _table(comparison: Comparison, columns: Sequence[Column]) -> Table:
    title = f"{comparison.model}: {comparison.settings['questions']} questions"
    made = Table(title=title, caption=_caption(comparison, len(columns) < len(COLUMNS)), box=SIMPLE_HEAD, caption_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column.name, justify="left" if number == 0 else "right", no_wrap=True)
    rows = [row for row in comparison.rows if row.reason is None]
    for keep in dict.fromkeys((row.spec == "full", row.keep) for row in rows):
        block = sorted((row for row in rows if (row.spec == "full", row.keep) == keep), key=lambda row: -(row.accuracy or 0))
        for number, row in enumerate(block):
            style = "bold" if number == 0 else "dim" if row.control else ""
            made.add_row(*(Text(column.text(row)) for column in columns), style=style)
        made.add_section()
    return made


def refused(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What could not be applied, and why: a method once for all budgets with the same reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            found.setdefault((row.method, row.reason), []).append(budget(row.keep))
    return [(f"{method} ({', '.join(budgets)})", reason) for (method, reason), budgets in found.items()]


def _caption(comparison: Comparison, narrow: bool) -> str:
    lines = ["first token: median time of a batch to its first token; realised: speed-up / what the saved FLOPs allow"]
    lines += [comparison.caution] if comparison.caution else []
    lines += ["a wider terminal shows more columns"] if narrow else []
    lines += [f"{what}: not applied. {reason}" for what, reason in refused(comparison.rows)]
    return "\n".join(lines)
