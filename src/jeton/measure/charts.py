"""Questions about charts: relaxed accuracy, and questions with programs made from templates, for a chart drawn from a table."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

WORDS = {
    "years": tuple(str(year) for year in range(2001, 2025)),
    "countries": ("Chile", "Ghana", "Nepal", "Norway", "Peru", "Samoa", "Spain", "Togo", "Tonga", "Vietnam"),
    "fruits": ("apples", "cherries", "figs", "grapes", "lemons", "melons", "pears", "plums"),
}
SERIES = ("Exports", "Imports", "Sales", "Stock", "Visits")


@dataclass(frozen=True)
class Chart:
    """A table to draw: `labels` along the axis, and one list of values for each of `series`."""

    labels: tuple[str, ...]
    series: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        if not self.labels or not self.series:
            raise ValueError("a chart needs labels and at least one series.")
        if any(len(values) != len(self.labels) for values in self.series.values()):
            raise ValueError(f"every series needs {len(self.labels)} values, one for each label.")


@dataclass(frozen=True)
class Question:
    """A question about a chart, the program that answers it (see `jeton.measure.programs`), and the answer."""

    question: str
    program: str
    answer: str


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """Whether a prediction is right: as a number within `tolerance` of the target's amount, else word for word.

    A target of 0 takes 0 alone. The released evaluation divides by the target with its sign, and so takes any number for a
    negative one.
    """
    said, wanted = _number(prediction), _number(target)
    if said is None or wanted is None:
        return prediction.strip() == target.strip()
    return abs(said - wanted) <= tolerance * abs(wanted) * (1 + 1e-12)


def relaxed_accuracy(predictions: Sequence[str], targets: Sequence[str], tolerance: float = 0.05) -> float:
    """The share of predictions that are right."""
    if len(predictions) != len(targets) or not targets:
        raise ValueError(f"there are {len(predictions)} predictions for {len(targets)} targets; give one for each.")
    return sum(relaxed(said, wanted, tolerance) for said, wanted in zip(predictions, targets, strict=True)) / len(targets)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# -- charts and questions ----------------------------------------------------------------------------------------------


def random_chart(seed: int, labels: int = 5, series: int = 2) -> Chart:
    """A chart of made-up numbers, the same for the same seed."""
    draw = random.Random(seed)
    pool = draw.choice(sorted(WORDS))
    if not 1 <= labels <= len(WORDS["fruits"]) or not 1 <= series <= len(SERIES):
        raise ValueError(f"charts have 1 to {len(WORDS['fruits'])} labels and 1 to {len(SERIES)} series.")
    names = draw.sample(WORDS[pool], labels)
    names = sorted(names) if pool == "years" else names
    values = {name: tuple(draw.sample(range(5, 100), labels)) for name in draw.sample(SERIES, series)}
    return Chart(tuple(names), values)


def questions(chart: Chart, seed: int = 0) -> list[Question]:
    """One question of every template that fits the chart: values, sums, means, differences, ratios, extremes, counts."""
    draw, found = random.Random(seed), []
    for name, values in chart.series.items():
        x, at = list(values), draw.randrange(len(values))
        step = f"<step>Y={x}</step>\n<step>X={list(chart.labels)}</step>\n"
        label, low, high = chart.labels[at], min(x), max(x)
        middle = sorted(x)[len(x) // 2]
        found += [
            Question(f"What is the value of {name} for {label}?", _program(step, f"Y[X.index({label!r})]"), _text(x[at])),
            Question(f"What is the sum of all {name}?", _program(step, "sum(Y)"), _text(sum(x))),
            Question(f"What is the average of {name}?", _program(step, "np.mean(Y)"), _text(sum(x) / len(x))),
            Question(
                f"What is the difference between the highest and the lowest {name}?",
                _program(step, "max(Y)-min(Y)"),
                _text(high - low),
            ),
            Question(f"Where is {name} highest?", _program(step, "X[np.argmax(Y)]"), chart.labels[x.index(high)]),
            Question(f"Where is {name} lowest?", _program(step, "X[np.argmin(Y)]"), chart.labels[x.index(low)]),
            Question(
                f"How many values of {name} are greater than {_text(middle)}?",
                _program(step, f"len([y for y in Y if y > {middle}])"),
                str(sum(y > middle for y in x)),
            ),
            Question(
                f"Is the sum of {name} greater than {_text(2 * high)}?",
                _program(step, f"sum(Y) > {2 * high}"),
                "Yes" if sum(x) > 2 * high else "No",
            ),
        ]
    if len(chart.series) > 1:
        found += _between(chart, draw)
    return found


def _between(chart: Chart, draw: random.Random) -> list[Question]:
    """Questions about two series."""
    (a, x), (b, y) = draw.sample(sorted(chart.series.items()), 2)
    label = draw.randrange(len(chart.labels))
    step = f"<step>A={list(x)}</step>\n<step>B={list(y)}</step>\n<step>X={list(chart.labels)}</step>\n"
    where, found = chart.labels[label], []
    if y[label]:
        found.append(
            Question(
                f"What is the ratio of {a} to {b} for {where}?",
                _program(step, f"A[X.index({where!r})]/B[X.index({where!r})]"),
                _text(x[label] / y[label]),
            )
        )
    more = [name for name, first, second in zip(chart.labels, x, y, strict=True) if first > second]
    if more:
        listed = more[0] if len(more) == 1 else f"{', '.join(more[:-1])} and {more[-1]}"
        question = f"Where is {a} higher than {b}?"
        found.append(Question(question, _program(step, "[n for n, p, q in zip(X, A, B) if p > q]"), listed))
    return found


def _program(step: str, value: str) -> str:
    return f"{step}<step>Answer={value}</step>"


def _text(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def picture(chart: Chart, size: int = 768) -> Image.Image:
    """The chart drawn as bars, `size` x `size` pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size / 100, size / 100), dpi=100)
    axes = figure.add_subplot()
    width = 0.8 / len(chart.series)
    for number, (name, values) in enumerate(chart.series.items()):
        places = [at + (number - (len(chart.series) - 1) / 2) * width for at in range(len(values))]
        axes.bar_label(axes.bar(places, values, width, label=name))
    axes.set_xticks(range(len(chart.labels)), chart.labels)
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB").resize((size, size))
