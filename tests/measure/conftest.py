"""A comparison made by hand, and one that was really run on the embedded model."""

import pytest
import torch
from PIL import Image

import jeton
from jeton.measure.compare import Comparison, compare
from jeton.measure.data import Question
from jeton.measure.machine import describe
from jeton.measure.plan import FULL, Case
from jeton.measure.row import Row
from jeton.measure.shown import Look, Shown

from .writer import Writer

SPECS = ("random", "pool", "divprune", "tome", "fastervlm", "fastv", "hired", "visionzip")


def made_row(method, keep, accuracy, control):
    return Row(
        method, f"{method}(keep={keep})", keep, control, kept=float(keep), fraction=keep / 144, accuracy=accuracy,
        low=accuracy - 0.05, high=accuracy + 0.05, retained=accuracy / 0.97, flops=0.5, seconds=0.02, seconds_low=0.019,
        seconds_high=0.022, speedup=1.9, ideal=2.0, realised=0.95, second_turn=accuracy - 0.01,
    )  # fmt: skip


@pytest.fixture
def made():
    """A comparison of eight methods at three budgets with one method refused and one example, without any model."""
    full = Row(
        "full", "full", None, False, kept=144.0, fraction=1.0, accuracy=0.97, low=0.94, high=0.99, retained=1.0, flops=1.0,
        seconds=0.04, seconds_low=0.04, seconds_high=0.04, speedup=1.0, ideal=1.0, realised=1.0, second_turn=0.96,
    )  # fmt: skip
    rows = [full]
    for number, name in enumerate(SPECS):
        rows += [made_row(name, keep, 0.9 - 0.03 * number - 2 / keep, name in ("random", "pool")) for keep in (36, 14, 7)]
    rows.append(Row("evit", "evit", 36, False, reason="evit reads the class token's attention, but <Model> has none."))
    maps = [torch.arange(144).view(12, 12)]
    looks = [Look(FULL, "red", True, [])]
    looks += [Look(Case(name, jeton.get(name), 14), "blue", False, maps) for name in SPECS]
    question = Question(Image.new("RGB", (84, 84), "teal"), "What <colour>?", ("red",), "0")
    settings = {"questions": 200, "keep": [36, 14, 7], "seed": 0, "batch_size": 32, "device": "cpu", "dtype": "float32"}
    return Comparison("a model", describe(), settings | {"tokens": 144}, rows, [Shown(question, [question.image], looks)])


@pytest.fixture(scope="package")
def ran():
    """Three methods and the controls at one budget on the embedded model, really run."""
    methods = ["divprune", "tome(r=12)", "tome(keep=72) | fastv"]
    return compare(methods=methods, keep=[36], limit=8, batch_size=4, pictures=1, progress=False)


@pytest.fixture(scope="session")
def writer() -> Writer:
    return Writer()
