"""Programs as answers (program of thoughts, as TinyChart answers questions that need calculation): parsed, run, chosen.

A model writes its answer as steps, ``<step>x = [1, 2, 3]</step><step>Answer = sum(x)</step>``; what is in `Answer` counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _interpreter

_STEP = re.compile(r"<step>(.*?)</step>", re.DOTALL)
_NO_NUMBERS = ("inf", "-inf", "nan")
# words that ask for a calculation rather than for what stands in the chart
CALCULATES = (
    *("sum", "total", "add", "added", "addition", "difference", "differ", "subtract", "minus", "exceed", "exceeds", "times"),
    *("multiply", "product", "ratio", "divide", "divided", "division", "average", "mean", "median", "mode", "absolute"),
    *("percentage change", "increase", "decrease", "more than", "less", "fewer", "greater", "bigger", "biggest", "higher"),
    *("highest", "lower", "lowest", "longer", "longest", "tallest", "smallest", "above", "below", "how many", "number of"),
)
_ASKS = re.compile(r"\b(" + "|".join(re.escape(word) for word in CALCULATES) + r")\b", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """What a program answers, or why it does not: `error` is a sentence about the program, None where it ran."""

    answer: str
    error: str | None = None

    @property
    def usable(self) -> bool:
        """True if it ran and its answer is no infinity and no missing number."""
        return self.error is None and self.answer.strip().lower() not in _NO_NUMBERS


def parse(text: str) -> str:
    """The program in a model's text: what stands between step markers, a line each, in order. Empty where there is no step."""
    return "\n".join(step.strip("\n").rstrip() for step in _STEP.findall(text))


def run(text: str, seconds: float = 2.0, megabytes: int = 256) -> Outcome:
    """Run the program in a model's text, in a process of its own with so much time and so much memory beyond the interpreter's.

    Programs are arithmetic, lists, loops and some functions of Python and numpy (as np). Imports, files, attributes that are no
    part of a calculation, functions and classes are refused before anything runs. Memory is bounded on Linux alone.
    """
    if seconds <= 0 or megabytes < 1:
        raise ValueError(f"a program needs some time and memory, got seconds={seconds!r} and megabytes={megabytes!r}.")
    program = parse(text)
    if not program.strip():
        return Outcome("", "there is no <step>...</step> in the text")
    try:
        _interpreter.check(program)
    except ValueError as error:
        return Outcome("", str(error))
    asked = json.dumps({"program": program, "seconds": seconds, "megabytes": megabytes})
    command = [sys.executable, "-I", str(Path(_interpreter.__file__))]
    alone = {name: os.environ[name] for name in ("SYSTEMROOT", "PATH") if name in os.environ}
    quiet = {**alone, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        # starting Python and numpy is not the program's time
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=seconds + 5, env=quiet, check=False)
    except subprocess.TimeoutExpired:
        return Outcome("", f"it runs longer than {seconds:g} s")
    if not done.stdout:  # the system has ended it
        return Outcome("", f"it runs longer than {seconds:g} s")
    found = json.loads(done.stdout)
    return Outcome(found.get("answer", ""), found.get("error"))


def asks_for_calculation(question: str) -> bool:
    """Whether a question has one of the words (`CALCULATES`) that ask for a calculation. The list is ours; TinyChart's has about
    30 such phrases and looks for them inside words too."""
    return _ASKS.search(question) is not None


def choose(question: str, program: Outcome, direct: str) -> str:
    """The program's answer where the question asks for a calculation and the program has one, else the direct answer."""
    return program.answer if asks_for_calculation(question) and program.usable else direct
