"""The comparison as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from ..engine.picture import sheet
from .plan import budget
from .plot import accuracy_plot
from .row import Row
from .shown import Shown
from .table import COLUMNS, percent, refused

if TYPE_CHECKING:
    from .compare import Comparison

_SIZE = 144  # pixels of one picture on the page


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write `report.html` and `compare.json` into `folder` and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(comparison.to_json(), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(comparison), encoding="utf-8")
    return page


def render(comparison: Comparison) -> str:
    """The page as text."""
    environment = Environment(loader=PackageLoader("jeton.measure"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    done = [row for row in comparison.rows if row.reason is None]
    return environment.get_template("report.html.j2").render(
        model=comparison.model,
        machine=comparison.machine,
        settings=comparison.settings,
        plots=[accuracy_plot(comparison.rows, against) for against in ("tokens", "flops")],
        columns=[column.name for column in COLUMNS],
        rows=[_line(row) for row in done],
        refused=refused(comparison.rows),
        budgets=_budgets(comparison),
        examples=[_example(shown) for shown in comparison.shown],
        verdict=verdict(done),
        caution=comparison.caution,
    )


def verdict(rows: list[Row]) -> list[str]:
    """One sentence a budget: the best method, what it keeps, and how the best control does."""
    found = []
    for keep in dict.fromkeys(row.keep for row in rows[1:] if row.keep is not None):
        block = sorted((row for row in rows[1:] if row.keep == keep), key=lambda row: row.accuracy or 0, reverse=True)
        best, control = block[0], next((row for row in block if row.control), None)
        ahead = f"{best.method} is ahead with {best.accuracy:.3f}, {percent(best.retained)} of full"
        text = f"At {budget(keep)}: {ahead}, for {percent(best.flops)} of the FLOPs"
        if control is not None and control is not best:
            text += f"; the best control, {control.method}, reaches {control.accuracy:.3f}"
            text += ", inside its interval" if (control.accuracy or 0) >= (best.low or 0) else ""
        found.append(text + ".")
    return found


def _line(row: Row) -> dict[str, Any]:
    """Cells with the numbers they are sorted by."""
    pairs = [(column.text(row), column.value(row)) for column in COLUMNS]
    return {"cells": pairs, "control": row.control, "spec": row.spec, "full": row.spec == "full"}


def _budgets(comparison: Comparison) -> list[str]:
    """Names of the budgets the examples can be looked at."""
    return list(dict.fromkeys(budget(look.case.keep) for shown in comparison.shown for look in shown.looks if look.maps))


def _example(shown: Shown) -> dict[str, Any]:
    """One example: the plain pictures and, per method, the overlay beside the answer."""
    full, *others = shown.looks
    looks = [
        {"method": look.case.label, "control": look.case.control, "budget": budget(look.case.keep), "answer": look.answer,
         "right": look.right, "picture": _inline(sheet(shown.pictures, look.maps, _SIZE))}
        for look in others if look.maps
    ]  # fmt: skip
    plain = [picture.resize((_SIZE, max(1, round(_SIZE * picture.height / picture.width)))) for picture in shown.pictures[:1]]
    return {
        "question": shown.question.text,
        "answers": " / ".join(shown.question.answers),
        "picture": _inline(plain[0]),
        "full": {"answer": full.answer, "right": full.right},
        "looks": looks,
    }


def _inline(picture: Image.Image) -> str:
    """The picture as a data address."""
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode("ascii")
