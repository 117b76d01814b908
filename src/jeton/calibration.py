"""What tuning a method on calibration data is made of: the `Study` a method searches in, and the `Calibration` it leaves.

A method never sees the model or the data. It asks a study what candidates are worth and says which of them it takes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .ops.search import Point, Range, chosen, maximise

FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """One candidate: what was tried, as plain numbers, and its score; `spec` is the method that was scored."""

    point: dict[str, Any]
    spec: str
    score: float


@dataclass(frozen=True)
class Calibration:
    """What a search found. method: the id; fields: those of the tuned method that differ from its defaults. objective, sampler,
    seed, data (how many inputs were scored): how it was searched. full: the score of the model with all tokens. space: the ranges
    that were searched. notes: what to know, e.g. an assumption that the data contradict."""

    method: str
    fields: dict[str, Any]
    objective: str
    model: str
    data: int
    full: float
    score: float
    sampler: str
    seed: int
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a JSON file, from which ``jeton.get(id, calibration=path)`` makes the method again."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no calibration file {path}; jeton.tune(...).save(path) writes one.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            data["fields"] = {name: _tuples(value) for name, value in data["fields"].items()}
            trials = tuple(Trial(_points(each["point"]), each["spec"], each["score"]) for each in data.pop("trials"))
            return cls(**data | {"trials": trials, "notes": tuple(data["notes"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no calibration that this version of jeton has written ({error}).") from error

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        lines = [
            f"{self.method}({fields})",
            f"{self.objective} {self.score:.4f}, with all tokens {self.full:.4f}; {len(self.trials)} candidates on {self.data} "
            f"inputs of {self.model}, {self.sampler}, seed {self.seed}",
        ]
        return "\n".join([*lines, *self.notes])


@dataclass
class Study:
    """Where a method searches. measure: the score of a candidate (None: the model with all tokens) on the calibration data;
    depth: layers of the language model; tokens: visual tokens of an image there. calls: how many candidates a search of a space
    may try, of which `warmup` at random."""

    measure: Callable[[Any | None], float]
    depth: int
    tokens: int
    calls: int = 60
    warmup: int | None = None
    sampler: str = "auto"
    seed: int = 0
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    searched: str = ""
    _full: float | None = None

    @property
    def full(self) -> float:
        """The score of the model with all tokens."""
        if self._full is None:
            self._full = _finite(self.measure(None), "the model with all tokens")
        return self._full

    def score(self, method: Any, **point: Any) -> float:
        """What a candidate is worth; `point` is how the search names it. A candidate is measured once."""
        known = next((trial.score for trial in self.trials if trial.spec == method.spec), None)
        score = _finite(self.measure(method), method.spec) if known is None else known
        if known is None:
            self.trials.append(Trial(point, method.spec, score))
        return score

    def maximise(self, make: Callable[[Point], Any], space: Mapping[str, Range], start: Iterable[Point] = ()) -> Any:
        """The best of the methods that `make` makes of `calls` points of a space; `start` points are tried first."""
        start = list(start)
        self.space = {name: asdict(x) for name, x in space.items()}
        self.searched = chosen(self.sampler)
        objective = lambda point: self.score(make(point), **point)  # noqa: E731
        best, _ = maximise(
            objective, space, max(self.calls, len(start)), start=start, warmup=self.warmup, sampler=self.sampler, seed=self.seed
        )
        return make(best)


def _finite(score: Any, what: str) -> float:
    score = float(score)
    if not math.isfinite(score):
        raise ValueError(f"the score of {what} is {score}; a search needs finite numbers.")
    return score


def _tuples(value: Any) -> Any:
    """JSON knows lists only; fields of methods are tuples, so that methods can be compared and hashed."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _points(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in point.items()}
